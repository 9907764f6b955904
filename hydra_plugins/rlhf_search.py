"""`hydra/sweeper=search`: a sweep whose runs Optuna chooses. Hydra looks for sweepers in this package."""

import logging
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

logging.getLogger("alembic").setLevel(logging.WARNING)  # otherwise each part of a database migration is logged


class Search(Sweeper):
    """Hydra's interface to `rlhf.sweep.search.Study`, which needs the extra `optuna`."""

    def __init__(self, **params: Any) -> None:
        # imported here, because Hydra imports this module even if the extra `optuna` is not installed
        from rlhf.sweep.search import Study

        self.study = Study(**params)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.study.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the missing trials of the study."""
        self.study.sweep(arguments)
