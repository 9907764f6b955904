"""The evaluations of a finished run, and which of them is shown.

The evaluation that was made during the training is in the run's own files. Every other one, such as that by a judge
chosen later, lies beside it in `evaluations/<digest>/`, with the same files: `summary.json` (its metrics and
configuration), `metrics.jsonl` (a line per evaluated step), `outcomes.jsonl` (a result per instruction),
`samples.jsonl` and `alpaca_eval.json`. A report shows the one that a command asked for last.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.files import EVALUATIONS, SUMMARY, read_object, write_json
from rlhf.tracking.reading import try_object

SHOWN = "shown.json"  # in `evaluations/`: the digest of the evaluation that was asked for last
# What the summary of an evaluation says in place of its run's.
MEASURED = ("metrics", "sft_metrics", "best", "config", "evaluation")


def place(run: Path, digest: str) -> Path:
    """The folder of an evaluation that was not made during the training of the run."""
    return run / EVALUATIONS / digest


def show(run: Path, digest: str) -> None:
    """Record that a command has asked for this evaluation; the one of the training is shown without a record."""
    if digest != shown_digest(run) and (place(run, digest).is_dir() or _shown(run).exists()):
        write_json(_shown(run), {"evaluation": digest})


def shown_digest(run: Path) -> str | None:
    """The digest of the evaluation that was asked for last; None if only the one of the training ever was."""
    digest = try_object(_shown(run))[0].get("evaluation")
    return digest if isinstance(digest, str) else None


def shown_folder(run: Path) -> Path:
    """The folder with the files of the evaluation to show: one in `evaluations/`, or the run's own."""
    digest = shown_digest(run)
    return place(run, digest) if digest and (place(run, digest) / SUMMARY).exists() else run


def shown_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a run with the results of the evaluation to show; None if the run is not complete.

    Raises:
        DamagedError: a summary cannot be read.
    """
    if not (run / SUMMARY).exists():
        return None
    summary, shown = read_object(run / SUMMARY, metrics=dict), shown_folder(run)
    return summary if shown == run else merged(summary, read_object(shown / SUMMARY, metrics=dict))


def merged(run: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a run with what another evaluation has found in place of its own."""
    own = {key: value for key, value in run.items() if key not in MEASURED}
    return {**own, **{key: evaluation[key] for key in MEASURED if key in evaluation}}


def _shown(run: Path) -> Path:
    return run / EVALUATIONS / SHOWN
