"""Small pieces of English for the sentences of a report: durations, counts and lists of labels."""

from collections.abc import Sequence

SHOWN = 5  # names that a sentence lists before it only counts the rest


def duration(seconds: float) -> str:
    """A duration with a suitable unit: seconds, minutes, or hours with one decimal."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def count(number: int, noun: str) -> str:
    """A number with its noun, which takes an "s" unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def quoted(labels: Sequence[str]) -> str:
    """Labels in quotation marks, as they may contain commas themselves."""
    return ", ".join(f"“{label}”" for label in labels)


def listing(labels: Sequence[str]) -> str:
    """Labels in quotation marks in a sentence: “a”, “b” and “c”; of more than six the first five, and how many more."""
    shown = [f"“{label}”" for label in labels]
    if len(shown) > SHOWN + 1:
        shown = [*shown[:SHOWN], f"{len(shown) - SHOWN} more"]
    return joined(shown)


def joined(parts: Sequence[str]) -> str:
    """Parts of a sentence as "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def abridged(names: Sequence[str]) -> str:
    """The first five names, and how many more there are; the page's table of runs lists all of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
