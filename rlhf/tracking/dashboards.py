"""Weights & Biases: one run a stage, with the stage's own step as x axis, samples, histograms, alerts and lineage.

The offline files hold all of it; `rlhf-sync` or `wandb sync` sends it later.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rlhf.errors import first_line
from rlhf.files import SUMMARY, read_json

log = logging.getLogger(__name__)
STEP = "step"  # the x axis: what metrics.jsonl calls so
GROUPS = ("sft", "reward", "ppo", "eval", "time", "guard", "judge")


def harmless(method: Callable[..., None]) -> Callable[..., None]:
    """What is sent beside the numbers must not stop a run: a failure is said, and that is all."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            log.warning("W&B, %s: %s", method.__name__, str(error).partition("\n")[0])

    return rank_zero_only(call)


class Dashboard(WandbLogger):
    """Lightning's logger with the stage's step as x axis (Lightning's counts optimiser steps), and what is no number.

    Every metric has its minimum, maximum and last value in the run's summary.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run, begun when it is first asked for."""
        import wandb

        if self._experiment is None:
            self._experiment = wandb.init(**self._wandb_init)
            self._experiment.define_metric(STEP, hidden=True)
            self._experiment.define_metric("samples", step_metric=STEP)
            self._experiment.define_metric("histogram/*", step_metric=STEP)
            for group in GROUPS:
                self._experiment.define_metric(f"{group}/*", step_metric=STEP, summary="min,max,last")
        return self._experiment

    @property
    def offline(self) -> bool:
        """Whether it was decided that nothing is sent now."""
        return self._wandb_init.get("mode") == "offline"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """The numbers of a step."""
        self.experiment.log({**metrics, STEP: step})

    @harmless
    def log_samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """A table of evaluated responses, a row each: `samples`, once an evaluation."""
        import wandb

        columns = list(records[0])
        rows = [[step, *(_cell(record.get(key)) for key in columns)] for record in records]
        table = wandb.Table(columns=[STEP, *columns], data=rows, allow_mixed_types=True)
        self.experiment.log({"samples": table, STEP: step})

    @harmless
    def log_histograms(self, scores: Tensor, ratio_counts: Tensor | None, largest_ratio: float, step: int) -> None:
        """`histogram/reward` of a rollout batch, and `histogram/ratio` of its updates' tokens."""
        import wandb

        found = {"histogram/reward": wandb.Histogram(scores[scores.isfinite()].tolist())}
        if ratio_counts is not None:
            edges = np.linspace(0, largest_ratio, len(ratio_counts) + 1)
            found["histogram/ratio"] = wandb.Histogram(np_histogram=(ratio_counts.long().cpu().numpy(), edges))
        self.experiment.log({**found, STEP: step})

    @harmless
    def alert(self, title: str, text: str) -> None:
        """What a guard has to say, by mail or Slack as the account is set up."""
        self.experiment.alert(title, text, level="WARN")

    @harmless
    def uses(self, name: str, folder: Path) -> None:
        """The run starts from the model in `folder`, if there is one: an edge of the lineage."""
        if not (folder / "model").exists():
            return
        # the public use_artifact refuses to work offline and waits for the server online; this is what it calls
        self.experiment._log_artifact(model_artifact(name, folder), is_user_created=True, use_after_commit=True)

    @harmless
    def leaves(self, name: str, folder: Path) -> None:
        """The run made the model in `folder`, if there is one."""
        if (folder / "model").exists():
            self.experiment.log_artifact(model_artifact(name, folder))

    @harmless
    def log_report(self, name: str, page: Path) -> None:
        """A sweep's page, to be read in W&B, and its folder (tables, figures) as an artefact."""
        import wandb

        self.experiment.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        artifact = wandb.Artifact(name, type="report")
        artifact.add_dir(str(page.parent), policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact)

    @harmless
    def close(self, exit_code: int = 0) -> None:
        """End the run here, so that the next stage of this process begins its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)

    def finalize(self, status: str) -> None:
        """Lightning says so at the end of each fit, which is no end yet, and after an exception, which is one."""
        if status == "failed":
            self.close(exit_code=1)


def model_artifact(name: str, folder: Path) -> Any:
    """A finished stage's model by reference: where it is and how good it was; no weights are copied or sent.

    The same folder gives the same artefact in every run, which is what makes an edge of two runs.
    """
    import wandb

    summary = read_json(folder / SUMMARY)
    metadata = {"stage": summary["stage"], "git_commit": summary["git_commit"], **summary["metrics"]}
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    artifact.add_reference((folder / "model").resolve().as_uri(), checksum=False)
    return artifact


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


WANDB_SECONDS = 20  # to connect in


WANDB_FINISH_SECONDS = 60  # to send the rest in


def wandb_logger(stage_tags: Mapping[str, Sequence[str]] | None = None, **options: Any) -> Dashboard:
    """A W&B run; without a key, or if W&B cannot be reached, it writes offline, to be synced later.

    It has the `tags`, and of `stage_tags` those of its stage (`job_type`): an SFT model knows no divergence.

    Should W&B vanish during the run, what cannot be sent within a minute of its end is left to `wandb sync` too.
    """
    import wandb
    from hydra.core.hydra_config import HydraConfig

    wandb.finish()  # the run of a sweep's job before this one, or it would be continued
    tags = [*(options.get("tags") or ()), *(stage_tags or {}).get(options.get("job_type") or "", ())]
    options = {**options, "tags": tags}
    options = {"save_dir": options.pop("save_dir", None) or HydraConfig.get().runtime.output_dir, **options}
    # where W&B keeps tables until they are sent; its own choice is the home folder
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(options["save_dir"]).resolve().parent / "wandb-staging"))
    if options.get("mode") == "offline" or not _has_wandb_key():
        return Dashboard(**{**options, "mode": "offline"})
    patience = wandb.Settings(
        init_timeout=WANDB_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, finish_timeout_raises=False
    )
    logger = Dashboard(settings=patience, **options)
    try:
        logger.experiment.id  # noqa: B018  (this is where it connects)
    except wandb.errors.Error as error:
        log.warning("W&B cannot be used (%s): writing offline, `wandb sync` sends it later", first_line(error))
        wandb.teardown()  # its helper process would say that the run's id is in use
        return Dashboard(mode="offline", **options)
    return logger


def _has_wandb_key() -> bool:
    from requests.utils import get_netrc_auth

    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth("https://api.wandb.ai"))
