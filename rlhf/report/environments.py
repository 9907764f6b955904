"""Whether what a report compares was computed alike: with one commit, the same versions, on the same processor."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.files import SUMMARY
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.runs import Sweep
from rlhf.report.text import joined, listing
from rlhf.tracking.reading import try_summary
from rlhf.tracking.sessions import environments, facts

# What a fact of an environment is called; any other is the version of a package.
NAMES = {"device": "device", "processor": "processor", "threads": "number of threads", "git_commit": "commit",
         "processes": "number of processes", "deterministic": "value of trainer.deterministic"}  # fmt: skip


def mixed(sweep: Sweep) -> Iterator[str]:
    """One sentence per difference between runs, or within one, that no configuration shows."""
    yield from _continued(sweep)
    if len(sweep.finished) > 1:
        yield from _differing("The runs", [env for run in sweep.finished for env in environments(run.summary)])
    measured = [run.summary.get("measured_in") or environments(run.summary) for run in sweep.finished]
    if any("measured_in" in run.summary for run in sweep.finished):
        yield from _differing("The evaluations", [env for envs in measured for env in envs])
    for stage, keys in (("SFT", ("sft_model",)), ("reward", ("reward_model", "reward_members"))):
        yield from _differing(f"The {stage} models of the runs", _models(sweep.finished, keys))


def commits(runs: Iterable[RecordedRun]) -> list[str]:
    """The commits that have made any of these runs, or a part of one."""
    return sorted({facts(env).get("git_commit", "unknown") for run in runs for env in environments(run.summary)})


def _continued(sweep: Sweep) -> Iterator[str]:
    """The runs of which not all was computed alike, by what changed."""
    found: dict[tuple[str, ...], list[str]] = {}
    for run in sweep.finished:
        sessions = environments(run.summary)
        changed = tuple(_name(key) for key, values in _values(sessions).items() if len(values) > 1)
        if len(sessions) > 1:
            found.setdefault(changed or ("environment, which was not noted,",), []).append(sweep.names[run.folder])
    for changed, names in found.items():
        yield f"Continued with another {joined(changed)} than begun: {listing(names)}."


def _differing(what: str, found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A sentence for each fact that is not the same in all environments, as far as it is known."""
    for key, values in _values(found).items():
        if len(values) > 1:
            first, of, rest = _name(key).partition(" of ")
            yield f"{what} were made with different {first}s{of}{rest} ({', '.join(sorted(values))})."


def _values(found: Iterable[Mapping[str, Any]]) -> dict[str, set[str]]:
    values: dict[str, set[str]] = {}
    for environment in found:
        for key, value in facts(environment).items():
            values.setdefault(key, set()).add(value)
    return values


def _name(key: str) -> str:
    return NAMES.get(key, f"version of {key}")


def _models(runs: Iterable[RecordedRun], keys: Iterable[str]) -> list[Mapping[str, Any]]:
    """The environments of the models that runs name under these keys of their summaries, as far as they are there."""
    found = dict[Path, None]()  # as an ordered set
    for run in runs:
        values = [run.summary.get(key) or [] for key in keys]
        names = [name for value in values for name in ([value] if isinstance(value, str) else value)]
        found |= {parent / "cache" / name / SUMMARY: None for parent in run.folder.resolve().parents for name in names}
    return [env for path in found if path.exists() for env in environments(try_summary(path)[0])]
