"""Which runs may be averaged as seeds of one row: those whose configurations differ in nothing that is trained."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.files import SUMMARY
from rlhf.report.recorded import RecordedRun

# keys that only say where a run stands, how it is shown or watched, and the replicate itself
DESCRIPTIVE = (
    "name", "output_dir", "seed", "resume", "dry_run", "report", "logger", "experiments", "sweeps", "objectives",
    "guards", "variant", "recipe", "debug", "cluster",
)  # fmt: skip
# of the trainer: on how many devices of which kind, and what is printed
DEVICES = (
    "_target_", "accelerator", "devices", "num_nodes", "strategy", "plugins", "callbacks", "logger", "profiler",
    "default_root_dir", "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "log_every_n_steps",
)  # fmt: skip
FETCHING = ("client", "cache")  # how a judge's answers are fetched and kept
Missing = object()


def divide(runs: Sequence[RecordedRun]) -> tuple[list[RecordedRun], list[tuple[RecordedRun, list[str]]]]:
    """(the runs of one configuration, the others with what they differ in).

    The configuration of most seeds is kept; of two with as many, that of the newest run.
    """
    groups: list[list[RecordedRun]] = []
    for run in runs:
        place = next((group for group in groups if not differences(group[0], run)), None)
        if place is None:
            groups.append([run])
        else:
            place.append(run)
    kept = max(groups, key=lambda group: (len({run.seed for run in group}), max(map(_written, group))))
    others = [(run, differences(kept[0], run)) for group in groups if group is not kept for run in group]
    return kept, others


def differences(reference: RecordedRun, run: RecordedRun) -> list[str]:
    """`key=value (there: value)` for what a run's configuration has otherwise than another's; [] if they are seeds.

    A key that only one of them has counts where both were made by the same code; otherwise it may just be newer. A
    summary without a configuration (of the first versions) fits every other.
    """
    if not (reference.config and run.config):
        return []
    same_code = _code(reference.summary) == _code(run.summary)
    ours, theirs = (_chosen(found.config) for found in (run, reference))
    return [
        f"{key}={_short(mine)} (there: {_short(other)})"
        for key, mine, other in _compared(ours, theirs)
        if same_code or (mine is not Missing and other is not Missing)
    ]


def _compared(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys((*ours, *theirs)):
        mine, other = ours.get(key, Missing), theirs.get(key, Missing)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from _compared(mine, other, f"{prefix}{key}.")
        elif mine != other:
            yield f"{prefix}{key}", mine, other


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the result."""
    left = {key: _without_fetching(value) for key, value in config.items() if key not in DESCRIPTIVE}
    trainer = left.get("trainer")
    if isinstance(trainer, Mapping):
        left["trainer"] = {key: value for key, value in trainer.items() if key not in DEVICES}
    return left


def _without_fetching(node: Any) -> Any:
    if not isinstance(node, Mapping):
        return node
    return {key: _without_fetching(value) for key, value in node.items() if key not in FETCHING}


def _code(summary: Mapping[str, Any]) -> tuple[Any, Any]:
    return summary.get("git_commit"), (summary.get("versions") or {}).get("rlhf")


def _written(run: RecordedRun) -> float:
    return (run.folder / SUMMARY).stat().st_mtime


def _short(value: Any) -> str:
    text = "absent" if value is Missing else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
