"""What computed a run: the environment of each session, which is a process that begins or continues its training.

`sessions.json`, beside the `checkpoints/` of a run or of a model that runs share, has an entry for the first session
and for each that computes with something else than the one before: the step `from_step` from which it trained, and the
keys of `ENVIRONMENT`. If there are several, the summary has them, too. Nothing here imports torch: reports read them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.files import SESSIONS, write_json
from rlhf.tracking.reading import try_object

log = logging.getLogger(__name__)
# What decides the last bits of a result, beside the configuration and the files that it names.
ENVIRONMENT = ("device", "processor", "threads", "processes", "deterministic", "versions", "git_commit")
UNKNOWN = "perhaps another environment than before, of which nothing was noted"


def begin(folder: Path, step: int, environment: Mapping[str, Any]) -> None:
    """Note that this process trains the run in `folder` from `step` on; warn if it computes with something else.

    What was trained after `step` by others is trained again, so that it does not count.
    """
    noted = try_object(folder / SESSIONS)[0] if step else {}
    sessions = [entry for entry in noted.get("sessions", []) if entry["from_step"] <= step]
    if step and not sessions:  # a version that noted nothing has begun it
        sessions = [{"from_step": 0}]
    changed = differences(sessions[-1], environment) if sessions else []
    if changed:
        said = "from step %d on, the bits are not those of a run without a break, as it now has %s"
        log.warning(said, step, ", ".join(changed))
    if changed or not sessions:
        sessions.append({"from_step": step, **environment})
    seconds = noted.get("seconds", 0.0)
    spent = {"before": seconds, "seconds": seconds, "peak_memory_bytes": noted.get("peak_memory_bytes", 0)}
    write_json(folder / SESSIONS, {"sessions": sessions, **spent})


def extend(folder: Path, seconds: float, peak: int) -> None:
    """Note at a checkpoint the seconds that this session has taken, and its peak memory in bytes."""
    noted, _ = try_object(folder / SESSIONS)
    if noted:
        spent = {"seconds": noted["before"] + seconds, "peak_memory_bytes": max(noted["peak_memory_bytes"], peak)}
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


def environments(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The environments of a run's sessions, by its summary: the only one, or those that differ, in order.

    Early versions recorded no sessions, but the `commits`.
    """
    earlier = [{"git_commit": commit} for commit in summary.get("commits") or []]
    return [entry for entry in summary.get("sessions") or [] if isinstance(entry, Mapping)] or [*earlier[:-1], summary]


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
