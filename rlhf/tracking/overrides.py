"""Which overrides distinguish the runs of a sweep from each other."""

from collections.abc import Collection, Iterable


def in_all(runs: Iterable[Collection[str]]) -> list[str]:
    """The overrides that every run has, in the order of the first; none if there is a single run.

    They say what the sweep is about, and distinguish no run: labels leave them out.
    """
    first, *others = [list(overrides) for overrides in runs] or [[]]
    return [item for item in first if all(item in other for other in others)] if others else []


def distinguishing(overrides: Iterable[str], common: Collection[str]) -> str:
    """The overrides that are not common to all runs, as on a command line."""
    return " ".join(item for item in overrides if item not in common)
