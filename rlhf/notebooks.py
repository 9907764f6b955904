"""The package in a notebook: `rlhf.compose`, `rlhf.run`, `rlhf.results` and `rlhf.load_policy` (docs/notebook.ipynb).

Nothing is written into the current folder but below `output_dir`, and no logger is configured. Mistakes are exceptions
of `rlhf.errors` with the sentence that the command line would show.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from rlhf import root
from rlhf.errors import ConfigError
from rlhf.errors.explaining import explain
from rlhf.finished.run import FinishedRun, located
from rlhf.report.checks import left_out
from rlhf.report.environments import mixed
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.runs import Sweep, load
from rlhf.sweep.plan import run_folder

if TYPE_CHECKING:
    import pandas as pd

    from rlhf.finished.chat.responders import Answer

log = logging.getLogger(__name__)


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that `rlhf OVERRIDES…` would run with, such as `compose(["debug=quick", "kl.coef=0.1"])`.

    Raises:
        ConfigError: an override names an unknown key or option, or cannot be parsed.
    """
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
            return hydra.compose("config", list(overrides), return_hydra_config=True)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise ConfigError(sentence) from None


def run(config: DictConfig) -> "Results":
    """Do a run, as `rlhf` does: finished already, taken over from an equal one, or made now.

    Its folder is that of the command with the same overrides: `output_dir/name/…`.

    Args:
        config: made by `compose`; values may have been changed since.

    Raises:
        UserError: the configuration, data or a model cannot be used.
        Interrupted: it was stopped after a step; the same call continues it.
    """
    from rlhf.cli import job

    if "hydra" not in config:
        raise ConfigError("the configuration holds no hydra node; allowed: what rlhf.compose returns")
    folder = Path(config.output_dir, config.name, run_folder(config, list(config.hydra.overrides.task))).resolve()
    node = OmegaConf.create({"hydra": config.hydra})
    with open_dict(node):
        node.hydra.runtime.output_dir = str(folder)
        node.hydra.mode = "RUN"
    own = OmegaConf.create({key: value for key, value in config.items_ex(resolve=False) if key != "hydra"})
    known = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().cfg = node  # type: ignore[assignment]
        job(own, folder, sweeping=False, bars=find_spec("ipywidgets") is not None)
    finally:
        HydraConfig.instance().cfg = known
    return results(folder)


def results(folder: str | Path) -> "Results":
    """What a run or the runs of a study recorded, as tables.

    Runs that are left out, and differences in what has computed the others, are warned of.

    Raises:
        NoRunsError: the folder has no finished run.
    """
    sweep = load([Path(folder)])
    for sentence in (*left_out(sweep), *mixed(sweep)):
        log.warning("%s", sentence)
    return Results(sweep)


@dataclass(frozen=True)
class Results:
    """The finished runs of a folder as pandas data frames.

    In each, `row` is the name of the configuration in the report, and `replicate` the seeds of its pipeline.
    """

    sweep: Sweep

    @cached_property
    def runs(self) -> "pd.DataFrame":
        """A line per run: its row, seeds, wall time in seconds, folder, and final metrics."""

        def line(run: RecordedRun) -> dict[str, Any]:
            return {"seconds": run.summary.get("wall_seconds"), "folder": str(run.folder), **run.summary["metrics"]}

        return self._frame(lambda run: [line(run)])

    @cached_property
    def curves(self) -> "pd.DataFrame":
        """A line per run and logged step: every metric (docs/metrics.md)."""
        return self._frame(lambda run: [values for _, values in sorted(run.metrics.items())])

    @cached_property
    def outcomes(self) -> "pd.DataFrame":
        """A line per run, evaluated step and evaluation instruction: whether it was won, its rewards, facts, tokens."""
        return self._frame(
            lambda run: [line for step, lists in sorted(run.outcomes.items()) for line in _by_instruction(step, lists)]
        )

    @cached_property
    def samples(self) -> "pd.DataFrame":
        """A line per run, evaluated step and sampled prompt: the response, its scores and the reference output."""
        return self._frame(lambda run: [line for steps in run.samples.values() for _, line in sorted(steps.items())])

    def _frame(self, lines: Callable[[RecordedRun], list[dict[str, Any]]]) -> "pd.DataFrame":
        """The lines of all finished runs, with row and replicate in front."""
        import pandas as pd

        rows = {id(run): row.label for row in self.sweep.trained for run in row.runs}
        return pd.DataFrame([
            {"row": rows.get(id(run)), "replicate": _replicate(run), **line}
            for run in self.sweep.finished
            for line in lines(run)
        ])  # fmt: skip


def _replicate(run: RecordedRun) -> str:
    """The seeds of the pipeline, one number where all stages have the same."""
    seeds = dict.fromkeys(run.seeds)
    return "-".join(map(str, seeds if len(seeds) == 1 else run.seeds))


def _by_instruction(step: int, lists: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of one evaluation: instruction i has the i-th entry of every list."""
    columns = {key: values for key, values in lists.items() if isinstance(values, list)}
    count = max((len(values) for values in columns.values()), default=0)
    return [
        {"step": step, "instruction": i, **{key: values[i] for key, values in columns.items() if len(values) == count}}
        for i in range(count)
    ]


def load_policy(run: str | Path) -> "LoadedPolicy":
    """The policy of a finished run: its folder, or `RUN/model_best`, or `RUN/kept/step-000020`.

    Raises:
        RunError: there is no finished run, it is a reward model, or its files are damaged.
        ModelError: the model cannot be loaded.
    """
    place = located(Path(run))
    return LoadedPolicy(FinishedRun.open(*place) if place else FinishedRun.open(Path(run)))


class LoadedPolicy:
    """A policy that answers prompts in the format of the data it was trained on.

    Attributes:
        run: where it comes from.
    """

    def __init__(self, run: FinishedRun):
        from rlhf.finished.chat.responders import open_responders

        self.run = run
        (self._responder,) = open_responders([run], scored=True, seed=0)

    def answer(
        self, prompt: str, temperature: float | None = None, max_new_tokens: int | None = None, seed: int = 0
    ) -> "Answer":
        """An answer with its scores: by the reward model or function it was trained against, and the data's utility.

        Args:
            prompt: an instruction; the run's own template is put around it.
            temperature: 0 is greedy; None is that of the run's evaluation, as for `max_new_tokens`.
            max_new_tokens: how long it may be.
            seed: of the sampling.

        Raises:
            RunError: the prompt is empty or longer than `model.max_prompt_tokens`.
        """
        from rlhf.finished.chat.responders import Sampling, reseed

        reseed([self._responder], seed)
        self._responder.forget()
        *_, last = self._responder.answer(prompt, Sampling(temperature, max_new_tokens))
        return last
