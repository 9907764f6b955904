"""What a run writes about itself: metrics by step, a summary, and which machine and code made it."""

import json
import logging
import os
import platform
import resource
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from rlhf import __version__
from rlhf.distributed import collectives
from rlhf.errors import first_line
from rlhf.errors.machine import writing
from rlhf.files import LINE_FILES, METRICS, SUMMARY, keep_lines, read_lines, read_object, write_json
from rlhf.files.checksums import seal
from rlhf.tracking.code import git_commit
from rlhf.tracking.dashboards import Dashboard

log = logging.getLogger(__name__)
WANDB_UNSENT_SECONDS = 60
WANDB_SECONDS = 20  # to connect in
WANDB_FINISH_SECONDS = 60  # to send the rest in
# what lines of an evaluation have: those of PPO's three files, of SFT and of the reward model
EVALUATED = ("time/evaluate", "response", "tokens", "sft/validation_loss", "reward/validation_loss")
PACKAGES = ("torch", "transformers", "peft", "lightning", "datasets", "hydra-core", "bitsandbytes")


class JsonLines(Logger):
    """`metrics.jsonl`: a JSON object per logged step, with `step` and wall-clock `time` (seconds since 1970)."""

    def __init__(self, folder: Path):
        super().__init__()
        self.path = folder / METRICS

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in summary.json and .hydra already."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return read_lines(folder / METRICS, "step")


def forget_after(folder: Path, step: int, evaluated: bool) -> None:
    """Drop from a run's line files what a resumed run will write again: all after `step`, and half a last line.

    `evaluated` says that the evaluation at `step` is complete and stays.
    """
    for name in LINE_FILES:
        if (folder / name).exists():
            keep_lines(folder / name, lambda line: _stays(line, step, evaluated), "step")


def _stays(line: dict[str, Any], step: int, evaluated: bool) -> bool:
    is_evaluation = any(key in line for key in EVALUATED)
    return line["step"] < step or (line["step"] == step and (evaluated or not is_evaluation))


def evaluated_at(folder: Path, step: int) -> dict[str, float]:
    """The metrics of the evaluation at `step`, {} if it was not finished."""
    found = [line for line in read_metrics(folder) if line["step"] == step and "time/evaluate" in line]
    return numbers(found[-1]) if found else {}


def maybe_unsent(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the lines that a resumed run keeps, those of its last minute: W&B, killed, loses what it had not written yet.

    It writes every 15 seconds. A line that is sent twice is one point of a curve.
    """
    return [line for line in lines if line.get("time", 0) > lines[-1].get("time", 0) - WANDB_UNSENT_SECONDS] or [
        *lines[-1:]
    ]


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of `metrics.jsonl`."""
    return {k: v for k, v in line.items() if k not in ("step", "time") and not k.startswith("guard/")}


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


def write_summary(
    folder: Path, metrics: Mapping[str, Any], config: Any, started: float, **extra: Any
) -> dict[str, Any]:
    """`summary.json`: written last and at once, so that its presence means the run is complete.

    `started` is of `time.monotonic()`: the clock on the wall may be set back meanwhile.
    """
    summary = {
        "metrics": dict(metrics),
        **extra,
        "wall_seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory(),
        "threads": torch.get_num_threads(),  # sums over another number of them have other last bits
        "versions": {"rlhf": __version__, "python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
        "config": config,
    }
    if collectives.size() > 1:
        summary["processes"] = collectives.size()
    collectives.on_rank_zero(lambda: seal(folder))
    collectives.on_rank_zero(lambda: write_json(folder / SUMMARY, summary))
    return summary


def read_summary(folder: Path) -> dict[str, Any] | None:
    """A run's summary, or None while it is not complete.

    Raises:
        DamagedError: it is no summary.
    """
    path = folder / SUMMARY
    return read_object(path, metrics=dict) if path.exists() else None


def run_id(summary: Mapping[str, Any]) -> str:
    """What a finished run is called where names must be unique, as in W&B."""
    return f"{summary['stage']}-{summary['identity']}"


def peak_memory() -> int:
    """Peak memory of this process in bytes: the GPU's allocations where there is one, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found
