"""What computed a run: the environment of each session, which is a process that begins or continues its training.

`sessions.json`, beside the `checkpoints/` of a run or of a model that runs share, has an entry for the first session
and for each that computes with something else than the one before: the step `from_step` from which it trained, and the
keys of `ENVIRONMENT`. If there are several, the summary has them, too. Nothing here imports torch: reports read them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.files import ANSWERS, METRICS, SESSIONS, SUMMARY, read_lines, write_json
from rlhf.tracking.reading import try_object

log = logging.getLogger(__name__)
# What decides the last bits of a result, beside the configuration and the files that it names.
ENVIRONMENT = ("device", "processor", "threads", "processes", "deterministic", "versions", "git_commit")
UNKNOWN = "perhaps another environment than before, of which nothing was noted"


def begin(folder: Path, step: int, environment: Mapping[str, Any]) -> None:
    """Note that this process trains the run in `folder` from `step` on; warn if it computes with something else.

    What others have trained after `step` is trained again, so that it does not count.
    """
    learning = step > 0 or (folder / ANSWERS).is_dir()  # from answers that were sampled before the first step
    earlier = [entry for entry in _noted(folder) if entry["from_step"] <= step] if learning else []
    _note(folder, step, environment, earlier)


def begin_measuring(folder: Path, step: int, environment: Mapping[str, Any]) -> None:
    """The same for an evaluation in `folder`, which may have measured other steps before it comes to `step`."""
    _note(folder, step, environment, _noted(folder) if read_lines(folder / METRICS) else [])


def copy(run: Path, evaluation: Path) -> None:
    """Note in the folder of an evaluation, which takes over what the training of `run` has measured, by what that was.

    Time and memory stay those of the training.
    """
    if (run / SESSIONS).exists() and not (evaluation / SESSIONS).exists():
        write_json(evaluation / SESSIONS, {"sessions": _noted(run)})


def _noted(folder: Path) -> list[Mapping[str, Any]]:
    """The sessions of what has begun in `folder`; versions that noted none may have left a summary."""
    found = try_object(folder / SESSIONS)[0].get("sessions")
    return found or [{"from_step": 0, **environments(try_object(folder / SUMMARY)[0])[-1]}]


def _note(folder: Path, step: int, environment: Mapping[str, Any], earlier: list[Mapping[str, Any]]) -> None:
    """Write the sessions `earlier` and this one, and the time and memory of the earlier ones."""
    changed = differences(earlier[-1], environment) if earlier else []
    if changed:
        said = "from step %d on, the bits are not those of a run without a break, as it now has %s"
        log.warning(said, step, ", ".join(changed))
    sessions = [*earlier, {"from_step": step, **environment}] if changed or not earlier else earlier
    spent = try_object(folder / SESSIONS)[0] if earlier else {}
    seconds, peak = spent.get("seconds", 0.0), spent.get("peak_memory_bytes", 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / SESSIONS, {"sessions": sessions, "before": seconds, "seconds": seconds, "peak_memory_bytes": peak}
    )


def extend(folder: Path, seconds: float, peak: int) -> None:
    """Note at a checkpoint the seconds that this session has taken, and its peak memory in bytes."""
    noted, _ = try_object(folder / SESSIONS)
    if noted:
        spent = {
            "seconds": round(noted["before"] + seconds, 2),
            "peak_memory_bytes": max(noted["peak_memory_bytes"], peak),
        }
        write_json(folder / SESSIONS, {**noted, **spent})


def told(folder: Path, seconds: float, peak: int) -> dict[str, Any]:
    """What the summary of a run says of its sessions, of which the last one took `seconds`, with a `peak` in bytes.

    Sessions that were killed count up to their last checkpoint.
    """
    noted, _ = try_object(folder / SESSIONS)
    total = max(noted.get("before", 0.0) + seconds, noted.get("seconds", 0.0))  # the last one may have trained nothing
    found = {"wall_seconds": round(total, 2), "peak_memory_bytes": max(noted.get("peak_memory_bytes", 0), peak)}
    sessions = noted.get("sessions", [])
    return {**found, "sessions": sessions} if len(sessions) > 1 else found


def environments(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments of a run's sessions, by its summary: the only one, or those that differ, in order.

    Early versions recorded no sessions, but the `commits`.
    """
    sessions = [entry for entry in summary.get("sessions") or [] if isinstance(entry, Mapping)]
    earlier = [{"git_commit": commit} for commit in summary.get("commits") or []]
    found = sessions or [*earlier[:-1], summary]
    return [{key: entry[key] for key in ENVIRONMENT if key in entry} for entry in found]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key=value instead of value` for everything in which two environments differ, as far as both are known."""
    old, new = facts(before), facts(now)
    if not old:
        return [UNKNOWN]
    return [f"{key}={new[key]} instead of {old[key]}" for key in new if key in old and old[key] != new[key]]


def facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """An environment as words: a name, or that of a package → its value or version; what is not known is left out.

    The number of threads only matters where they compute.
    """
    known = {key: value for key in ENVIRONMENT if (value := environment.get(key)) is not None}
    if known.get("device", "cpu") != "cpu":
        known.pop("threads", None)
    versions = known.pop("versions", None)
    return {key: str(value) for key, value in {**known, **(versions if isinstance(versions, Mapping) else {})}.items()}
