"""Loggers whose files continue where a resumed run does: what `rlhf.tracking.metrics_file` keeps is what they hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger

Line = Mapping[str, Any]


@runtime_checkable
class Continued(Protocol):
    """A logger that can be brought to where a run resumes."""

    def continue_from(self, kept: Sequence[Line], forgotten: int | None) -> None:
        """Hold the lines `kept` of metrics.jsonl; those from step `forgotten` on, if any, were dropped there."""


def continue_loggers(loggers: Iterable[Logger], kept: Sequence[Line], forgotten: int | None) -> None:
    """Bring the loggers of a resumed run to where its `metrics.jsonl` is; other libraries' own are left alone."""
    for logger in loggers:
        if isinstance(logger, Continued):
            logger.continue_from(kept, forgotten)
