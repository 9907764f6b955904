"""Guards watch the metrics that a step logs anyway, and report what goes wrong in one sentence.

A guard is a detector (`rlhf.guards.detectors`) with an action: `off`, `warn` or `stop`. Guards need no extra pass of a
model. Their state is not saved either: a resumed run replays the lines of `metrics.jsonl`.
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
from rlhf.guards.base import Metrics, Remedies
from rlhf.guards.detectors import DETECTORS
from rlhf.settings import GuardsSettings

log = logging.getLogger(__name__)
MAX_SAVED_BATCHES = 10  # files in `inspect/`: a run that skips updates now and then must not fill the disk


@dataclass
class Finding:
    """What a guard found in a run.

    Attributes:
        count: The number of logged lines at which it found something.
        first_step: The step of the first of them.
        message: The message at the first step, with the usual cause and what to try.
    """

    count: int
    first_step: int
    message: str


class Guards:
    """All active guards of a run. Each logs its first finding, counts all of them, and may stop the run.

    Args:
        settings: The actions, windows and limits. Without settings no guard is active.
        folder: The run's folder, which gets `inspect/`. Without a folder no batches are saved.
        remedies: The keys of the stage that their advice names; those of PPO by default.
    """

    def __init__(
        self, settings: GuardsSettings | None = None, folder: Path | None = None, remedies: Remedies | None = None
    ):
        options = {item.name: getattr(settings, item.name) for item in fields(settings)} if settings else {}
        self.actions = {name: option.action for name, option in options.items() if option.action != "off"}
        self.detectors = {name: DETECTORS[name](options[name]) for name in self.actions}
        self.folder, self.remedies = folder, asdict(remedies or Remedies())
        self.findings: dict[str, Finding] = {}
        self.stop_message: str | None = None

    @property
    def skips_updates(self) -> bool:
        """Whether updates with a non-finite loss or gradient are skipped, which the guard `non_finite` decides."""
        return "non_finite" in self.detectors

    def skip_reason(self, loss: float, grad_norm: float) -> str:
        """Return which of the two ("loss" or "gradient") is not finite, so that the update is skipped; "" otherwise."""
        if not self.skips_updates or (math.isfinite(loss) and math.isfinite(grad_norm)):
            return ""
        return "loss" if not math.isfinite(loss) else "gradient"

    def update(self, step: int, metrics: Metrics, replayed: bool = False) -> dict[str, float]:
        """Pass one logged line to all guards.

        A replayed line is counted, but not logged as a warning again.

        Returns:
            `guard/<name>`, the number of findings so far, for each guard that found something in this line.
        """
        counts = {}
        for name, detector in self.detectors.items():
            message = detector.update(step, metrics)
            if message is None:
                continue
            message = f"{message}; {detector.advice.format(**self.remedies)}"
            finding = self.findings.setdefault(name, Finding(0, step, message))
            finding.count += 1
            counts[f"guard/{name}"] = float(finding.count)
            if finding.count == 1 and not replayed:
                log.warning("step %d, guard %s: %s", step, name, message)
            if self.actions[name] == "stop" or detector.must_stop:
                # Not raised here: the step is to be logged and saved first (see `check`).
                self.stop_message = f"guard {name} stopped the run at step {step}: {message}"
        return counts

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Restore the state from the lines that an earlier process of this run logged. Logs no warnings."""
        for line in lines:
            self.update(line["step"], line, replayed=True)

    def check(self) -> None:
        """Stop the run if a guard asked for it. Called between steps.

        Raises:
            GuardStop: A guard asked for it, in this process or in an earlier one of the same run.
        """
        if self.stop_message:
            raise GuardStop(self.stop_message)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return the findings (count, first step and message) by guard."""
        return {name: asdict(finding) for name, finding in self.findings.items()}

    def save_batch(self, step: int, tensors: Mapping[str, Tensor], reason: str) -> Path | None:
        """Save a batch whose update was skipped as `inspect/step-000012.safetensors`, with `reason` in its metadata.

        The file is written atomically. At most `MAX_SAVED_BATCHES` of them are kept, the first ones.

        Returns:
            The file, or None if nothing was saved.
        """
        if self.folder is None:
            return None
        folder = self.folder / "inspect"
        path = folder / f"step-{step:06d}.safetensors"
        # A resumed run may save the same step again, which needs no more space.
        if len(list(folder.glob("*.safetensors"))) >= MAX_SAVED_BATCHES and not path.exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with aside(path) as temporary:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
                temporary,
                {"step": str(step), "reason": reason},
            )
        log.warning("step %d: the %s was NaN or infinite, so the update was skipped; its batch is in %s",
                    step, reason, path)  # fmt: skip
        return path
