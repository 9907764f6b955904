"""Training of stages with a real trainer on the CPU; gradients and weights to compare."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf.models.roles import Roles
from rlhf.stages.base import Stage
from rlhf.stages.batches import SeededBatches, loader
from rlhf.tracking.metrics_file import JsonLines, read_metrics


def quiet_trainer(folder: Path, **options: Any) -> lightning.Trainer:
    """A trainer like the pipeline's, without progress bars."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(
        accelerator="cpu", logger=[JsonLines(folder)], inference_mode=False, num_sanity_val_steps=0,
        **quiet, **options,
    )  # fmt: skip


def fit(stage: Stage, rows: Any, batches: SeededBatches, folder: Path, **options: Any) -> list[dict[str, float]]:
    """Train a stage on the CPU and return the logged metrics; `ckpt_path` resumes from a checkpoint."""
    resume = {"ckpt_path": options.pop("ckpt_path"), "weights_only": True} if "ckpt_path" in options else {}
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=[JsonLines(folder)], enable_progress_bar=False, inference_mode=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(stage, loader(rows, getattr(stage, "collate", list), batches), **resume)
    return read_metrics(folder)


@contextmanager
def record_gradients() -> Iterator[list[list[Tensor | None]]]:
    """Record the gradients at each optimiser step: one list per step, with None for a missing gradient."""
    seen: list[list[Tensor | None]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append([None if p.grad is None else p.grad.clone() for p in trained])

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def copy_weights(roles: Roles) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in roles.named_parameters()}


def changed_weights(before: dict[str, Tensor], roles: Roles) -> set[str]:
    return {name for name, p in roles.named_parameters() if not torch.equal(before[name], p)}


def assert_gradients_close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], atol: float) -> None:
    """Compare gradients with relative tolerance 1e-3; more than four of the expected ones must be non-zero."""
    compared = 0
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None and theirs.abs().max() > 0:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=atol)
            compared += 1
        elif ours is not None:
            assert ours.abs().max() == 0
    assert compared > 4
