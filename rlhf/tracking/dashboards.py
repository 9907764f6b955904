"""Weights & Biases: one W&B run per stage, with metrics, samples, histograms, alerts and the lineage of models.

Without a key or a connection, all of it is written to offline files, which `rlhf-sync` or `wandb sync` uploads later.
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
from rlhf.files import MODEL, SUMMARY, read_json
from rlhf.tracking.continuing import Line
from rlhf.tracking.metrics_file import metrics_of

log = logging.getLogger(__name__)
STEP = "step"  # the x axis: the stage's own step, as in metrics.jsonl
GROUPS = (
    "sft",
    "reward",
    "ppo",
    "dpo",
    "best_of_n",
    "eval",
    "time",
    "guard",
    "judge",
)  # of metrics, by the part before the slash
WANDB_SECONDS = 20  # to wait for a connection
WANDB_FINISH_SECONDS = 60  # to wait at the end of a run until everything is uploaded
WANDB_UNSENT_SECONDS = 60  # W&B writes to its files every 15 seconds; the rest is a margin


def warn_on_failure(method: Callable[..., None]) -> Callable[..., None]:
    """Decorate a method that logs more than numbers: a failure is logged as a warning and does not end the run.

    Only rank zero calls the method.
    """

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            log.warning("W&B, %s: %s", method.__name__, first_line(error))

    return rank_zero_only(call)


class Dashboard(WandbLogger):
    """Lightning's W&B logger, extended by samples, histograms, alerts, the lineage of models, and reports.

    Unlike in Lightning's logger, where the x axis counts optimiser steps, it is the stage's own step. W&B's summary of
    the run has the minimum, maximum and last value of every metric.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started on first access."""
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
        """Whether the run is only written to offline files."""
        return self._wandb_init.get("mode") == "offline"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics of a step."""
        self.experiment.log({**metrics, STEP: step})

    @rank_zero_only
    def continue_from(self, kept: Sequence[Line], forgotten: int | None) -> None:
        """Send again what may have been lost with the earlier process; samples and histograms of those steps stay lost.

        Steps that are trained again are logged over the earlier points.
        """
        for line in maybe_unsent(kept):
            self.log_metrics(metrics_of(line), line["step"])

    @warn_on_failure
    def log_samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log the evaluated responses of a step as the table `samples`, one line of `samples.jsonl` per row."""
        import wandb

        columns = list(records[0])
        rows = [[step, *(_cell(record.get(key)) for key in columns)] for record in records]
        table = wandb.Table(columns=[STEP, *columns], data=rows, allow_mixed_types=True)
        self.experiment.log({"samples": table, STEP: step})

    @warn_on_failure
    def log_histograms(self, scores: Tensor, ratio_counts: Tensor | None, largest_ratio: float, step: int) -> None:
        """Log `histogram/reward` of a rollout batch, and `histogram/ratio` of the importance ratios of its updates.

        Args:
            scores: [rollouts]; non-finite scores are left out.
            ratio_counts: [bins], tokens by ratio in bins of equal width from 0 to `largest_ratio`; None: not counted.
            largest_ratio: the upper edge of the last bin.
            step: the PPO step.
        """
        import wandb

        histograms = {"histogram/reward": wandb.Histogram(scores[scores.isfinite()].tolist())}
        if ratio_counts is not None:
            edges = np.linspace(0, largest_ratio, len(ratio_counts) + 1)
            histograms["histogram/ratio"] = wandb.Histogram(np_histogram=(ratio_counts.long().cpu().numpy(), edges))
        self.experiment.log({**histograms, STEP: step})

    @warn_on_failure
    def alert(self, title: str, text: str) -> None:
        """Send a guard's message, by mail or Slack as the W&B account is configured."""
        self.experiment.alert(title, text, level="WARN")

    @warn_on_failure
    def log_input_model(self, name: str, folder: Path) -> None:
        """Record that the run uses the model in `folder`, if there is one: an incoming edge of the lineage."""
        if not (folder / MODEL).exists():
            return
        # the public use_artifact does not work offline and waits for the server online; this is what it calls
        self.experiment._log_artifact(model_artifact(name, folder), is_user_created=True, use_after_commit=True)

    @warn_on_failure
    def log_output_model(self, name: str, folder: Path) -> None:
        """Record that the run made the model in `folder`, if there is one: an outgoing edge of the lineage."""
        if (folder / MODEL).exists():
            self.experiment.log_artifact(model_artifact(name, folder))

    @warn_on_failure
    def log_report(self, name: str, page: Path) -> None:
        """Log a sweep's report: the page for display in W&B, and its folder (tables, figures) as an artefact."""
        import wandb

        self.experiment.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        artifact = wandb.Artifact(name, type="report")
        artifact.add_dir(str(page.parent), policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact)

    @warn_on_failure
    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, so that the next stage of this process can start its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)

    def finalize(self, status: str) -> None:
        """Finish the W&B run after an exception; Lightning also calls this after each fit, when the stage goes on."""
        if status == "failed":
            self.close(exit_code=1)


def model_artifact(name: str, folder: Path) -> Any:
    """A W&B artefact that refers to a finished stage's model by its path; no weights are copied or uploaded.

    Its metadata are the stage, the commit and the final metrics. The same folder gives the same artefact in every run,
    which links the run that made the model to those that use it.
    """
    import wandb

    summary = read_json(folder / SUMMARY)
    metadata = {"stage": summary["stage"], "git_commit": summary["git_commit"], **summary["metrics"]}
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    artifact.add_reference((folder / MODEL).resolve().as_uri(), checksum=False)
    return artifact


def _cell(value: Any) -> Any:
    """A value for a W&B table, which has no cells for lists and objects: those are written as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def wandb_logger(stage_tags: Mapping[str, Sequence[str]] | None = None, **options: Any) -> Dashboard:
    """A logger with a W&B run of its own, which is the `_target_` of `logger=wandb`.

    Without a key, or if W&B cannot be reached, the run is written to offline files. If the connection is lost during
    the run, what cannot be uploaded within a minute of its end also remains for `wandb sync`.

    Args:
        stage_tags: tags by stage; those of the run's stage (`job_type`) are added to its `tags`. A tag may not suit all
            stages: an SFT model has no divergence.
        options: keywords of Lightning's `WandbLogger`; `save_dir` is Hydra's output folder by default.
    """
    import wandb
    from hydra.core.hydra_config import HydraConfig

    wandb.finish()  # a previous job of a sweep in this process may have left its run open, which would be continued
    tags = [*(options.get("tags") or ()), *(stage_tags or {}).get(options.get("job_type") or "", ())]
    options = {**options, "tags": tags}
    options = {"save_dir": options.pop("save_dir", None) or HydraConfig.get().runtime.output_dir, **options}
    # where W&B keeps tables until they are uploaded; the default is below the home folder
    os.environ.setdefault("WANDB_DATA_DIR", str(Path(options["save_dir"]).resolve().parent / "wandb-staging"))
    if options.get("mode") == "offline" or not _has_wandb_key():
        return Dashboard(**{**options, "mode": "offline"})
    timeouts = wandb.Settings(
        init_timeout=WANDB_SECONDS, finish_timeout=WANDB_FINISH_SECONDS, finish_timeout_raises=False
    )
    logger = Dashboard(settings=timeouts, **options)
    try:
        logger.experiment.id  # noqa: B018  (starts the run, which connects to the server)
    except wandb.errors.Error as error:
        log.warning("W&B cannot be used (%s): writing offline, `wandb sync` uploads it later", first_line(error))
        wandb.teardown()  # or its helper process would report that the id of the run is in use
        return Dashboard(mode="offline", **options)
    return logger


def maybe_unsent(lines: Sequence[Line]) -> list[Line]:
    """The lines of `metrics.jsonl` that W&B may have lost when a run was killed: those of its last minute.

    A resumed run logs them again. A line that reaches W&B twice is still one point of a curve.
    """
    if not lines:
        return []
    last = lines[-1].get("time", 0)
    return [line for line in lines if line.get("time", 0) > last - WANDB_UNSENT_SECONDS]


def _has_wandb_key() -> bool:
    """Whether there is a key for W&B: in the environment, or in `~/.netrc`, where `wandb login` writes it."""
    from requests.utils import get_netrc_auth

    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth("https://api.wandb.ai"))
