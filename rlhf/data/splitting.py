"""Which split a row belongs to, and the records that a split makes of it: for data that comes in one piece."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features

from rlhf.data.reading import REASON, code_digest, generated
from rlhf.data.records import SPLITS, Split
from rlhf.errors import DataError

ToRecords = Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Shares:
    """Splits and the shares of the keys that they get. A key is in one split at most, whatever else there is."""

    shares: tuple[tuple[Split, float], ...]
    seed: int = 0

    @classmethod
    def parse(cls, shares: Any, seed: int, allowed: tuple[Split, ...] = SPLITS) -> "Shares":
        """Understand a mapping from split to share; those of 0 or null are dropped.

        Raises:
            DataError: an unknown split, something that is no share, none at all, or more than the whole.
        """
        given = {split: share or 0 for split, share in shares.items()} if isinstance(shares, Mapping) else {}
        usual = all(type(share) in (int, float) and 0 <= share <= 1 for share in given.values())
        if not given or not set(given) <= set(allowed) or not usual or not 0 < sum(given.values()) < 1 + 1e-9:
            raise DataError(
                f"shares maps some of {', '.join(allowed)} to shares that add up to 1 at most, not {shares!r}."
            )
        return cls(tuple((split, given[split]) for split in allowed if given.get(split)), seed)

    @property
    def splits(self) -> tuple[Split, ...]:
        """Those with a share."""
        return tuple(split for split, _ in self.shares)

    def split_of(self, key: str) -> Split | None:
        """The split of a key: by a hash, so that it depends neither on the order of the rows nor on other rows."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        place = int.from_bytes(digest[:6]) / 2**48  # a float holds six bytes exactly, so 1 is never reached
        for split, share in self.shares:
            if place < share:
                return split
            place -= share
        return None


def expand(rows: Dataset, to_records: ToRecords, features: Features, name: str, nothing: str) -> Dataset:
    """None, one or several records for each row; cached by `rows`, `to_records` and the code.

    The files of `rows` are read, not mapped: mapped pages would count as memory used. So `rows` must be as generated,
    but for rows with a reason, which are passed over.

    Raises:
        DataError: there is not a single record; it says `nothing`.
    """
    files = tuple(file["filename"] for file in rows.cache_files)
    return generated(
        _records, _Expansion(files, to_records, nothing, (rows._fingerprint, code_digest())), features, name
    )


@dataclass(frozen=True)
class _Expansion:
    """All that determines the records: hashed into the cache key."""

    files: tuple[str, ...]
    to_records: ToRecords
    nothing: str
    stamps: tuple[str, ...]


def _records(job: _Expansion) -> Iterator[dict[str, Any]]:
    empty = True
    for file in job.files:
        with pa.OSFile(file) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                for row in batch.to_pylist():
                    for record in job.to_records(row) if not row[REASON] else ():
                        empty = False
                        yield record
    if empty:
        raise DataError(job.nothing)
