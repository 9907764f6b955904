"""Which runs may be averaged as replicates of one row: those whose configurations agree in all that decides the result.

Overrides alone do not show this: after an edit of the experiment's file, the same overrides give another configuration.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rlhf.files import SUMMARY
from rlhf.pipeline.identity import LIGHTNING, decisive, idle, of_trainer
from rlhf.report.recorded_run import RecordedRun
from rlhf.tracking.seeds import SEED_KEYS

# Top-level keys that do not change what is trained: a run's name and place, how it is watched and reported, and groups
# such as `variant` whose choice shows in the keys that they set.
DESCRIPTIVE = (
    "name", "output_dir", "resume", "dry_run", "report", "logger", "experiments", "sweeps", "objectives",
    "guards", "variant", "recipe", "debug", "cluster",
)  # fmt: skip
# Keys of `trainer` that early versions set themselves; today they are refused.
EARLY_TRAINER_KEYS = ("plugins", "callbacks", "logger", "enable_checkpointing")
# Keys at any depth that do not change the result: where answers are stored.
STORING = ("cache",)
MISSING = object()  # stands for the value of an absent key, as null is a value


def split_by_config(runs: Sequence[RecordedRun]) -> tuple[list[RecordedRun], list[tuple[RecordedRun, list[str]]]]:
    """Split runs of the same overrides into those of one configuration and the others.

    The configuration with most replicates is chosen; among equals, the one of the newest run.

    Returns:
        (runs of the chosen configuration, [(other run, its `differences` from the chosen ones)]).
    """
    groups: list[list[RecordedRun]] = []
    for run in runs:
        matching = next((group for group in groups if not differences(group[0], run)), None)
        if matching is None:
            groups.append([run])
        else:
            matching.append(run)
    chosen = max(groups, key=lambda group: (len({run.seeds for run in group}), max(map(_finish_time, group))))
    others = [(run, differences(chosen[0], run)) for group in groups if group is not chosen for run in group]
    return chosen, others


def differences(reference: RecordedRun, run: RecordedRun, groups: Collection[str] = ()) -> list[str]:
    """`key=value (there: reference's value)` for each key that decides the result and differs; [] for replicates.

    With `groups` only keys of these groups of the configuration count.

    A key that only one configuration has is a difference if the same code made both runs. Otherwise the key may just be
    newer than the other run, and is ignored. A run without a configuration (early versions recorded none) differs from
    no other.
    """
    if not (reference.config and run.config):
        return []
    same_code = _code(reference.summary) == _code(run.summary)
    own, other = (_decisive(found.config, found.summary.get("stage", "ppo")) for found in (run, reference))
    return _other_files(reference, run, groups) + [
        f"{key}={_short(value)} (there: {_short(other_value)})"
        for key, value, other_value in _unequal(own, other)
        if key not in SEED_KEYS and (not groups or key.partition(".")[0] in groups)
        if same_code or (value is not MISSING and other_value is not MISSING)
    ]


def _other_files(reference: RecordedRun, run: RecordedRun, groups: Collection[str]) -> list[str]:
    """The files that both configurations name and whose content has changed between the runs, by their keys.

    Runs of early versions have not recorded what they have read.
    """
    own, other = (found.summary.get("files") or {} for found in (run, reference))
    return [
        f"{key}: a file or folder of another content"
        for key in sorted(own.keys() & other.keys())
        if own[key] != other[key] and (not groups or key.partition(".")[0] in groups)
    ]


def _unequal(own: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value in `own`, value in `other`) for every leaf that differs; `MISSING` where a key is absent."""
    for key in dict.fromkeys((*own, *other)):
        value, other_value = own.get(key, MISSING), other.get(key, MISSING)
        if isinstance(value, Mapping) and isinstance(other_value, Mapping):
            yield from _unequal(value, other_value, f"{prefix}{key}.")
        elif value != other_value:
            yield f"{prefix}{key}", value, other_value


def _decisive(config: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The part of a configuration that decides the result: what a run is known by, but for where answers are stored."""
    left_out = {*DESCRIPTIVE, *idle(stage)}
    found = {key: decisive(_without_storing(value), f"{key}.") for key, value in config.items() if key not in left_out}
    trainer = found.get("trainer")
    if isinstance(trainer, Mapping):
        kept = {key: value for key, value in trainer.items() if key not in EARLY_TRAINER_KEYS}
        found["trainer"] = of_trainer({"_target_": LIGHTNING[0], **kept})
    return found


def _without_storing(node: Any) -> Any:
    """A node of a configuration without the keys of `STORING`, at any depth."""
    if not isinstance(node, Mapping):
        return node
    return {key: _without_storing(value) for key, value in node.items() if key not in STORING}


def _code(summary: Mapping[str, Any]) -> tuple[Any, Any]:
    """The commit and the package version that made a run."""
    return summary.get("git_commit"), (summary.get("versions") or {}).get("rlhf")


def _finish_time(run: RecordedRun) -> float:
    """When a run finished: a summary is written last."""
    return (run.folder / SUMMARY).stat().st_mtime


def _short(value: Any) -> str:
    """A value as text, cut off after 60 characters."""
    text = "absent" if value is MISSING else "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
