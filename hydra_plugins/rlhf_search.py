"""`hydra/sweeper=search`: a sweep whose jobs Optuna chooses. Hydra finds sweepers in this namespace only."""

import logging
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's migrations would tell of each of their parts


class Search(Sweeper):
    """The study itself is `rlhf.sweep.search.Study`, which needs the extra `optuna`."""

    def __init__(self, **params: Any) -> None:
        # imported here, for Hydra imports this module whether or not the extra is installed
        from rlhf.sweep.search import Study

        self.study = Study(**params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's; before `sweep`."""
        self.study.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Make the trials that are missing."""
        self.study.sweep(arguments)
