"""The evaluations of a finished run, and which of them is shown.

The evaluation that was made during the training is in the run's own files. Every other one, such as that by a judge
chosen later, lies beside it in `evaluations/<digest>/`, with the same files: `summary.json` (its metrics and
configuration), `metrics.jsonl` (a line per evaluated step), `outcomes.jsonl` (a result per instruction),
`samples.jsonl` and `alpaca_eval.json`. A report shows the one that a command asked for last. An evaluation of another
run than the one that is there, such as one that was copied, is ignored (`foreign`).
"""

import logging
import os
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from rlhf.files import EVALUATIONS, SUMMARY, read_object, write_json
from rlhf.tracking.reading import try_object
from rlhf.tracking.sessions import environments

log = logging.getLogger(__name__)
SHOWN = "shown.json"  # in `evaluations/`: the digest of the evaluation that was asked for last
# What the summary of an evaluation says in place of its run's.
MEASURED = ("metrics", "sft_metrics", "best", "config", "evaluation", "files")


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
    shown = place(run, digest) if digest else run
    if not (shown / SUMMARY).exists():
        return run
    if why := foreign(shown):
        log.warning("%s; it is ignored", why)
        return run
    return shown


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
    """The summary of a run with what another evaluation has found in place of its own; `measured_in`: by what."""
    own = {key: value for key, value in run.items() if key not in MEASURED}
    found = {key: evaluation[key] for key in MEASURED if key in evaluation}
    return {**own, **found, "measured_in": environments(evaluation)}


def foreign(folder: Path) -> str:
    """Why the complete evaluation in a folder is none of the run that it lies beside; "" if it is one.

    Its summary records the identity of the run that was measured.
    """
    if folder.parent.name != EVALUATIONS:
        return ""
    made, run = try_object(folder / SUMMARY)[0], try_object(folder.parent.parent / SUMMARY)[0]
    if not made or not run or str(made.get("identity")) == str(run.get("identity")):
        return ""
    return f"{folder} measures another run ({made.get('identity')}) than that which is there ({run.get('identity')})"


def make_room(folder: Path) -> None:
    """Move the evaluation of another run out of a folder that is to get one of the run that it lies beside."""
    if why := foreign(folder):
        name = f"{folder.name}-of-{try_object(folder / SUMMARY)[0].get('identity')}"
        names = (folder.with_name(f"{name}{suffix}") for suffix in chain([""], (f"-{i}" for i in count(2))))
        target = next(path for path in names if not path.exists())
        log.warning("%s; it moves to %s", why, target)
        os.replace(folder, target)


def rename_run(run: Path, before: Any, after: str) -> None:
    """Record in the evaluations of a run that its identity is now another one, as it was copied under that."""
    for summary in (run / EVALUATIONS).glob(f"*/{SUMMARY}"):
        made = try_object(summary)[0]
        if made and made.get("identity") == before != after:
            write_json(summary, {**made, "identity": after})


def _shown(run: Path) -> Path:
    return run / EVALUATIONS / SHOWN
