"""What became of the rows that were read: how many were kept, and how many were skipped for which reason."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHOWN = 3  # row numbers listed for each reason


@dataclass(frozen=True)
class RowReport:
    """The rows of one split.

    Attributes:
        read: Source name → number of rows read.
        skipped: (source name, reason) → numbers of the skipped rows.
    """

    read: dict[str, int]
    skipped: dict[tuple[str, str], list[int]]

    @property
    def counts(self) -> dict[str, int]:
        """Number of skipped rows by reason, the most frequent first, as in a stage's summary."""
        counts: Counter[str] = Counter()
        for (_, reason), rows in self.skipped.items():
            counts[reason] += len(rows)
        return dict(counts.most_common())

    def lines(self) -> list[str]:
        """One line per source and reason, with the first row numbers, for the log."""
        return [
            skipped_line(source, len(rows), self.read[source], reason, rows[:SHOWN])
            for (source, reason), rows in self.skipped.items()
        ]


def skipped_line(source: str, count: int, total: int, reason: str, first: Sequence[int]) -> str:
    """A line for the log: `count` of `total` rows of `source` were skipped for `reason`, the `first` ones by number."""
    numbers = ", ".join(f"{row:,}" for row in first)
    rows = f"row{'s' * (count > 1)} {numbers}{', …' * (count > len(first))}"
    return f"{source}: {count:,} of {total:,} rows skipped: {reason} ({rows})"


def reasons_and_counts(counts: Mapping[str, int]) -> str:
    """For an error message: `3 × empty text, 1 × not UTF-8`."""
    return ", ".join(f"{count:,} × {reason}" for reason, count in counts.items())
