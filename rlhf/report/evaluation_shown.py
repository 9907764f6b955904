"""Which evaluation of a finished run is shown, and the sentence that says so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.files import EVALUATIONS, SUMMARY
from rlhf.report.recorded_run import RecordedRun
from rlhf.tracking.evaluations import foreign, merged, place, shown_digest
from rlhf.tracking.reading import try_summary

TRAINING = "training"  # stands for the evaluation made during the training


def with_evaluation(
    folder: Path, summary: dict[str, Any], chosen: str | None
) -> tuple[dict[str, Any], Path | None, str]:
    """The summary of a run by the evaluation to show, the evaluation's folder, and why it cannot be shown.

    Args:
        folder: the run.
        summary: its own summary.
        chosen: the digest of an evaluation, or `training`; None for the one that a command asked for last.

    Returns:
        (summary, folder, ""), the folder being None for the evaluation made during the training; or (the run's own
        summary, None, a reason).
    """
    digest = chosen or shown_digest(folder)
    if digest in (None, TRAINING, summary.get("evaluation")):
        return summary, None, ""
    measured = place(folder, str(digest))
    found, fault = try_summary(measured / SUMMARY)
    fault = fault or foreign(measured)
    if found and not fault:
        return merged(summary, found), measured, ""
    if chosen:
        return summary, None, fault or f"it has no evaluation {digest}"
    return summary, None, "" if found else fault


def evaluation_shown(runs: Sequence[RecordedRun]) -> list[str]:
    """The sentences that say which evaluation a report of these runs shows, and which are ignored; none without any."""
    ignored = [f"{why}, and is ignored." for run in runs if (why := _foreign_one(run))]
    return [*_shown(runs), *ignored]


def _foreign_one(run: RecordedRun) -> str:
    """Why the evaluation that a command asked for last is not shown, if it is that of another run."""
    digest = shown_digest(run.folder)
    return foreign(place(run.folder, digest)) if digest else ""


def _shown(runs: Sequence[RecordedRun]) -> list[str]:
    """The sentence that says which evaluation is shown; none if there is no other."""
    if not any((run.folder / EVALUATIONS).is_dir() or run.summary.get("stage") == "evaluate" for run in runs):
        return []
    shown: dict[str, list[RecordedRun]] = {}
    for run in runs:
        shown.setdefault(_name(run), []).append(run)
    if len(shown) == 1:
        return [f"Measured by {next(iter(shown))}."]
    parts = "; ".join(f"{len(found)} by {name}" for name, found in shown.items())
    return [f"Not all runs are measured alike, so that their figures must not be compared: {parts}."]


def _name(run: RecordedRun) -> str:
    """An evaluation in words: its digest, and by whom it judges what."""
    measured: Mapping[str, Any] = run.config.get("evaluation") or {}
    factscore, judge = measured.get("factscore"), run.config.get("judge") or {}
    node = factscore or judge
    by = str(node.get("_target_", "")).rpartition(".")[2]
    model = next((f" ({node[key]})" for key in ("model", "folder") if node.get(key)), "")
    own = run.summary.get("evaluation", "") if run.summary.get("stage") == "evaluate" else "made during the training"
    digest = run.measured.name if run.measured else own
    return f"the evaluation {digest}, {by}{model} on {measured.get('prompts')} prompts"
