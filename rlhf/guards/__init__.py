"""Guards: what goes wrong in training, read off the metrics that a step logs anyway, and said in one sentence.

They need no pass of their own, and no state either: a resumed run shows them the lines of `metrics.jsonl` again.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import GuardStop
from rlhf.files import aside
from rlhf.guards.signs import GUARDS, Metrics
from rlhf.settings import GuardsSettings

log = logging.getLogger(__name__)
MOST_SAVED = 10  # batches in `inspect/`: a run that skips now and then must not fill the disk


@dataclass
class Finding:
    """What a guard saw: at how many logged steps, at which first, and what it said then."""

    count: int
    first_step: int
    message: str


class Guards:
    """All guards of a run that are not off: what they find is logged once, counted always, and summed up at the end."""

    def __init__(self, settings: GuardsSettings | None = None, folder: Path | None = None):
        options = {item.name: getattr(settings, item.name) for item in fields(settings)} if settings else {}
        self.actions = {name: option.action for name, option in options.items() if option.action != "off"}
        self.watching = {name: GUARDS[name](options[name]) for name in self.actions}
        self.folder = folder
        self.findings: dict[str, Finding] = {}
        self.stopped: str | None = None

    @property
    def skip(self) -> bool:
        """Whether updates that are no numbers are to be skipped."""
        return "non_finite" in self.watching

    def skip_reason(self, loss: float, grad_norm: float) -> str:
        """Which of the two is not finite, so that the update must be skipped; empty if both are finite."""
        if not self.skip or (math.isfinite(loss) and math.isfinite(grad_norm)):
            return ""
        return "loss" if not math.isfinite(loss) else "gradient"

    def see(self, step: int, metrics: Metrics, again: bool = False) -> dict[str, float]:
        """Show all guards a line; returns `guard/<name>` with its count for those that found something."""
        counts = {}
        for name, guard in self.watching.items():
            words = guard.see(step, metrics)
            if words is None:
                continue
            found = self.findings.setdefault(name, Finding(0, step, f"{words}; {guard.advice}"))
            found.count += 1
            counts[f"guard/{name}"] = float(found.count)
            if found.count == 1 and not again:
                log.warning("step %d, guard %s: %s", step, name, found.message)
            if self.actions[name] == "stop" or getattr(guard, "exhausted", False):
                self.stopped = f"guard {name} stopped the run at step {step}: {words}; {guard.advice}"
        return counts

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Come to know what an earlier process of this run logged; says nothing anew."""
        for line in lines:
            self.see(line["step"], line, again=True)

    def check(self) -> None:
        """Called at a step boundary.

        Raises:
            GuardStop: a guard asked for it, now or in an earlier process of this run.
        """
        if self.stopped:
            raise GuardStop(self.stopped)

    def summary(self) -> dict[str, dict[str, Any]]:
        """By guard: count, first step and message."""
        return {name: asdict(found) for name, found in self.findings.items()}

    def save(self, step: int, tensors: Mapping[str, Tensor], reason: str) -> Path | None:
        """Keep a batch whose loss or gradient (`reason`) is no number as `inspect/step-000012.safetensors`.

        It is there whole or not at all, and not beside many others.
        """
        folder = self.folder and self.folder / "inspect"
        if folder is None:
            return None
        path = folder / f"step-{step:06d}.safetensors"
        if len(list(folder.glob("*.safetensors"))) >= MOST_SAVED and not path.exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with aside(path) as temporary:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                temporary,
                {"step": str(step), "reason": reason},
            )
        log.warning("step %d: a %s that is no finite number, so no update; its batch is in %s", step, reason, path)
        return path
