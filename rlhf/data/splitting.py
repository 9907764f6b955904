"""Divide a data set that comes in one piece into splits, and make the records of a split from its rows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

from rlhf.data.caching import REASON, cached_rows, code_digest
from rlhf.data.records import SPLITS, Split
from rlhf.errors import DataError

ToRecords = Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Shares:
    """Assigns each key (a text or an id that identifies a row) to at most one split.

    Attributes:
        shares: The splits in a fixed order, each with its share of the keys, in (0, 1]. Keys beyond the sum are unused.
        seed: Selects the assignment.
    """

    shares: tuple[tuple[Split, float], ...]
    seed: int = 0

    @classmethod
    def parse(cls, shares: Any, seed: int, allowed: tuple[Split, ...] = SPLITS) -> "Shares":
        """Parse a mapping from split to share. A share of 0 or null is the same as none.

        Raises:
            DataError: a split that is not `allowed`, a share outside [0, 1], no share above 0, or a sum above 1.
        """
        given = {split: share or 0 for split, share in shares.items()} if isinstance(shares, Mapping) else {}
        valid = all(type(share) in (int, float) and 0 <= share <= 1 for share in given.values())
        # The tolerance of 1e-9 is for the rounding error of the sum.
        if not given or not set(given) <= set(allowed) or not valid or not 0 < sum(given.values()) < 1 + 1e-9:
            raise DataError(
                f"data.shares={shares!r} is not allowed; allowed: a mapping from some of {', '.join(allowed)} to "
                "shares that add up to 1 at most."
            )
        # In the order of `allowed`, so that a change of the last share moves no key of the earlier splits.
        return cls(tuple((split, given[split]) for split in allowed if given.get(split)), seed)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits with a share above 0."""
        return tuple(split for split, _ in self.shares)

    def require(self, split: Split) -> None:
        """Check that `split` has a share.

        Raises:
            DataError: it has none.
        """
        if split not in self.splits:
            raise DataError(f"data.shares has no share for {split}; allowed: {', '.join(self.splits)}.")

    def split_of(self, key: str) -> Split | None:
        """The split of a key, or None. It depends on the key and the seed only, not on other keys or their order."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        place = int.from_bytes(digest[:6]) / 2**48  # in [0, 1): a double represents 48 bits exactly, so never 1
        for split, share in self.shares:
            if place < share:
                return split
            place -= share
        return None


def expand(rows: Dataset, to_records: ToRecords, features: Features, name: str, if_empty: str) -> Dataset:
    """Make any number of records from each row, cached by the rows, `to_records` and the code.

    Args:
        rows: A data set from `cached_rows`. Its Arrow files are read as a whole, so rows may have been removed from it
            only if they have a reason in the column `REASON`: such rows are passed over.
        to_records: Yields the columns of each record of a row. Its pickle is part of the cache key.
        features: The columns of the records.
        name: The split's name, for the cache and messages.
        if_empty: The message of the error if there is no record.

    Raises:
        DataError: there is no record.
    """
    files = tuple(file["filename"] for file in rows.cache_files)
    job = _Expansion(files, to_records, if_empty, (rows._fingerprint, code_digest()))
    return cached_rows(_generate_records, job, features, name)


@dataclass(frozen=True)
class _Expansion:
    """Everything that determines the records; its pickle is the cache key."""

    files: tuple[str, ...]
    to_records: ToRecords
    if_empty: str
    fingerprints: tuple[str, ...]


def _generate_records(job: _Expansion) -> Iterator[dict[str, Any]]:
    empty = True
    for file in job.files:
        # Read, not memory-mapped: the pages of a mapped file count towards the resident memory of the process.
        with pa.OSFile(file) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for row in batch.to_pylist():
                    for record in job.to_records(row) if not row[REASON] else ():
                        empty = False
                        yield record
    if empty:
        raise DataError(job.if_empty)
