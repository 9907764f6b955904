"""What all stages share: accumulation within a token budget, AdamW with a schedule, metrics by step."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf.distributed import collectives, lockstep
from rlhf.errors import ConfigError
from rlhf.guards import Guards
from rlhf.models.roles import Roles
from rlhf.policy_settings import OptimizerSettings


@runtime_checkable
class RichLogger(Protocol):
    """A logger that takes more than numbers, such as that of W&B (`rlhf.tracking.dashboards`)."""

    def log_samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Evaluated responses, a record each."""

    def log_histograms(self, scores: Tensor, ratio_counts: Tensor | None, largest_ratio: float, step: int) -> None:
        """The scores of a rollout batch, and how many ratios fell into each of equal bins from 0 to `largest_ratio`."""

    def alert(self, title: str, text: str) -> None:
        """What a guard has found."""


@dataclass(frozen=True)
class Step:
    """The result of an optimiser step: the gradient norm before clipping, and the sums that the losses returned.

    `count` is what the sums are to be divided by: the targets in all processes. `skip_reason` says why the step was
    skipped; it is empty when the step was made.
    """

    grad_norm: Tensor
    sums: dict[str, Tensor]
    count: Tensor
    skip_reason: str = ""


# A term of the loss, summed over its targets, and sums to report.
Term = tuple[Tensor, Mapping[str, Tensor]]


class Stage(lightning.LightningModule):
    """Manual optimisation: micro-batches within a token budget, normalised by the whole minibatch, one clip, one step.

    `total_steps` is the length of the training, and of the learning-rate schedule unless that is given.
    """

    roles: Roles
    lr_ratio: float = 1.0  # how many times larger the learning rate of LoRA's B is (`lora.lr_ratio`)

    def __init__(self, settings: OptimizerSettings, total_steps: int, schedule_steps: int | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.settings, self.total_steps, self.schedule_steps = settings, total_steps, schedule_steps
        self.timings: dict[str, float] = {}
        self.resumed_at = 0
        self.guards = Guards()

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW over all parameters that require a gradient, with the schedule of `lr_factor`.

        With LoRA+ (Hayou et al. 2024, arXiv 2402.12354) the matrices B have a learning rate of their own.
        """
        named = {name: p for name, p in self.named_parameters() if p.requires_grad}
        trained = list(named.values())
        groups: list[dict[str, Any]] = [{"params": trained}]
        if self.lr_ratio != 1:
            faster = {name for name in named if ".lora_B." in name}
            groups = [
                {"params": [p for name, p in named.items() if name not in faster]},
                {"params": [named[name] for name in sorted(faster)], "lr": self.settings.lr * self.lr_ratio},
            ]
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.settings.lr,
            eps=self.settings.adam_eps,
            weight_decay=self.settings.weight_decay,
            fused=all(p.device.type in ("cuda", "cpu") for p in trained),
        )
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, lambda step: self.lr_factor(step))}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches on the host: the passes send what they need (`rlhf.models.sequences`)."""
        return batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save only the parameters that are trained; the frozen base can be loaded again."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["processes"] = collectives.size()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that this run cannot continue exactly.

        Raises:
            ConfigError: the checkpoint was made by another number of processes.
        """
        made_by = checkpoint.get("processes", 1)
        if made_by != collectives.size():
            raise ConfigError(
                f"trainer.devices · trainer.num_nodes={collectives.size()}, but the checkpoint was made by {made_by}, "
                "and each process draws its own random numbers; allowed: as many as before, or resume=never"
            )

    def load_trained(self, path: Path) -> None:
        """Load the weights of a checkpoint outside of training, for an evaluation that is still due."""
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        self.load_state_dict(checkpoint["state_dict"], strict=False)

    def lr_factor(self, step: int) -> float:
        """Factor of the learning rate at `step`: linear warm-up to 1, then the schedule down to 0 at its end.

        No step is trained at rate 0: warm-up begins above it, and the schedule reaches it only after the last step.
        """
        warmup = self.settings.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        last = self.schedule_steps or self.total_steps
        progress = min((step - warmup) / max(last - warmup, 1), 1.0)
        return {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[
            self.settings.schedule
        ]

    def microbatches(self, batch: Any) -> list[Tensor]:
        """Row indices of `batch` in groups of at most `microbatch_tokens` tokens, with padding where there is any."""
        groups = self.roles.groups(batch.lengths.tolist(), self.settings.microbatch_tokens)
        return [torch.tensor(group) for group in groups]

    def accumulate(
        self,
        parts: Sequence[Any],
        terms: Callable[[Any], Iterable[Term]],
        count: int,
        clip_each: bool = False,
    ) -> Step:
        """One optimiser step over several micro-batches (`parts`).

        `terms` gives the terms of a part's loss, each as the *sum* over its targets, which is divided here by the count
        over all parts and processes: a mean per part would give tokens of short parts more weight. A term is
        back-propagated before the next is asked for, so that only one term's activations exist at a time.
        `clip_each` also clips after every part, to reproduce a fault of the published code.
        """
        total_count = collectives.all_reduce_sum(torch.full((), count, device=self.device))
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        limit = self.settings.max_grad_norm or math.inf
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        sums: dict[str, Tensor] = {}
        filling = lockstep.filler_parts(parts)
        for part in parts:
            for total, extra in terms(part):
                self.manual_backward(total / total_count)
                for key, value in {"loss": total, **extra}.items():
                    sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach()
            if clip_each:
                nn.utils.clip_grad_norm_(trained, limit)
        for part in filling:
            for total, _ in terms(part):
                self.manual_backward(0 * total)  # see `lockstep.filler_parts`
        collectives.all_reduce_([*(p.grad for p in trained if p.grad is not None), *sums.values()])
        norm = nn.utils.clip_grad_norm_(trained, limit)
        skip_reason = self.skip_reason(norm, sums, total_count)
        if skip_reason:  # without gradients the step changes nothing, but Lightning still counts it
            optimizer.zero_grad(set_to_none=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return Step(norm, sums, total_count, skip_reason)

    def skip_reason(self, norm: Tensor, sums: Mapping[str, Tensor], count: Tensor | int) -> str:
        """Why the optimiser step must be skipped; empty if it need not be. Synchronises with the device once."""
        if not self.guards.skips_updates:
            return ""
        return self.guards.skip_reason(*torch.stack([sums["loss"], norm.to(sums["loss"])]).tolist())

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop if a guard asks for it. This runs after the callbacks, so a checkpoint that is due has been written."""
        self.guards.check()

    def on_validation_end(self) -> None:
        """Stop after an evaluation if a guard asks for it."""
        self.guards.check()

    @property
    def steps_done(self) -> int:
        """Steps finished so far: optimiser steps, or rollout batches in PPO; set when a run is resumed."""
        # a trainer that only validates counts no steps, and a run that was killed at its very end gets none
        return max(self._trainer.global_step if self._trainer is not None else 0, self.resumed_at)

    @steps_done.setter
    def steps_done(self, step: int) -> None:
        self.resumed_at = step

    def advance_schedule(self) -> None:
        """Advance the learning rate by one step."""
        self.lr_schedulers().step()  # type: ignore[union-attr]

    @property
    def current_lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]

    @property
    def dashboards(self) -> list[RichLogger]:
        """The loggers that accept more than numbers."""
        return [logger for logger in self.loggers if isinstance(logger, RichLogger)]

    def emit(self, metrics: Mapping[str, Tensor | float], step: int, bar: Sequence[str] = ()) -> dict[str, float]:
        """Send metrics to the guards, to every logger under `step`, and to Lightning's callbacks and progress bar.

        Synchronises with the device once.
        """
        tensors = {key: value.double() for key, value in metrics.items() if isinstance(value, Tensor)}
        on_host = dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)) if tensors else {}
        values = {key: float(on_host.get(key, value)) for key, value in metrics.items()}
        found = self.guards.update(step, values)
        for logger in self.loggers:
            logger.log_metrics(values | found, step)
        for name in (key.removeprefix("guard/") for key, count in found.items() if count == 1):
            for dashboard in self.dashboards:
                dashboard.alert(f"guard {name}", f"step {step}: {self.guards.findings[name].message}")
        self.log_dict({k: v for k, v in values.items() if k not in bar}, logger=False, batch_size=1)
        self.log_dict({k: v for k, v in values.items() if k in bar}, logger=False, prog_bar=True, batch_size=1)
        return values

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of a phase to `time/<phase>`, in seconds, including the device's work."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.timings[f"time/{phase}"] = self.timings.get(f"time/{phase}", 0.0) + time.perf_counter() - started

    def take_timings(self) -> dict[str, float]:
        """The times of all phases since the last call, in seconds."""
        timings, self.timings = self.timings, {}
        return timings
