"""Turn rows into records. Every row read is either kept or reported with its source, number and reason.

A generator decides about each row, and `datasets` caches its output including the reasons, so that the report is the
same whether the rows were just read or came from the cache.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any, Literal, Protocol, cast

from datasets import Dataset, Features, Value

from rlhf.data.caching import REASON, cached_rows, code_digest
from rlhf.data.records import RECORDS, Split
from rlhf.data.reports import RowReport, reasons_and_counts
from rlhf.errors import DataError, RowError

log = logging.getLogger(__name__)
_said: set[tuple[str, ...]] = set()  # lines about skipped rows, each with the sources and their fingerprints

OnBadRow = Literal["skip", "fail"]
ToRecord = Callable[[Any], Any]


class RowSource(Protocol):
    """Where numbered rows come from: `rlhf.data.sources.Source`, or one that also finds the columns of the fields."""

    @property
    def name(self) -> str: ...  # noqa: D102
    def check(self) -> None: ...  # noqa: D102
    def fingerprint(self) -> str: ...  # noqa: D102
    def rows(self) -> Iterator[tuple[int, Any]]: ...  # noqa: D102


@dataclass(frozen=True)
class _Job:
    """Everything that determines which records the rows become; its pickle is the cache key."""

    sources: tuple[RowSource, ...]
    to_record: ToRecord
    columns: dict[str, str]
    deduplicate: bool
    fingerprints: tuple[str, ...]


def read_records(
    sources: Sequence[RowSource],
    to_record: ToRecord,
    split: str,
    *,
    on_bad_row: OnBadRow = "skip",
    deduplicate: bool = True,
    record: type | None = None,
) -> tuple[Dataset, RowReport]:
    """Read the rows of `sources`, convert them to records, and log how many were skipped.

    Args:
        sources: Where the rows come from, in this order.
        to_record: Returns the record of a row (a dataclass instance), or a list of any number of them, or raises
            `RowError`. Its pickle is part of the cache key (see `cached_rows`).
        split: The split, whose record class gives the columns; with `record`, only a name for messages.
        on_bad_row: `skip` counts and skips bad rows; `fail` raises an error.
        deduplicate: Whether a row with the same records as an earlier one is a bad row.
        record: The record class, if it is not that of the split. Its fields are strings, or numbers if their type is
            `float | None`.

    Returns:
        The records and the report.

    Raises:
        DataError: a source cannot be read, no row can be used, or `on_bad_row` is `fail` and there is a bad row.
    """
    fingerprints = (*(source.fingerprint() for source in sources), code_digest(to_record.__module__))
    found = fields(record or RECORDS[cast(Split, split)])
    types = {field.name: "float64" if field.type == (float | None) else "string" for field in found}
    job = _Job(tuple(sources), to_record, types, deduplicate, fingerprints)
    features = types | {"_file": "string", REASON: "string", "_row": "int64"}
    rows = cached_rows(_convert_rows, job, Features({name: Value(type) for name, type in features.items()}), split)
    report, kept = _report_and_kept(rows)
    if on_bad_row == "fail" and report.skipped:
        (file, reason), numbers = next(iter(report.skipped.items()))
        raise DataError(
            f"{split}: {file}, row {numbers[0]:,}: {reason} (data.on_bad_row=skip skips and counts such rows)."
        )
    if not kept:
        reasons = reasons_and_counts(report.counts)
        raise DataError(f"{split}: no row of {', '.join(report.read)} can be used ({reasons}).")
    for line in report.lines():
        # the runs of a sweep share their rows, and so does a split that is read twice
        said = (split, line, *fingerprints, *(str(getattr(source, "path", "")) for source in sources))
        log.log(logging.DEBUG if said in _said else logging.WARNING, "%s: %s", split, line)
        _said.add(said)
    return rows.select(kept).select_columns(list(job.columns)), report


def _convert_rows(job: _Job) -> Iterator[dict[str, Any]]:
    """Yield the fields of each record of each row, or for a bad row empty fields and the reason why it is bad."""
    no_record = {name: "" if type == "string" else None for name, type in job.columns.items()}
    seen: set[bytes] | None = set() if job.deduplicate else None
    empty = True
    for source in job.sources:
        for number, row in source.rows():
            try:
                records, reason = _record_fields(row, job.to_record, seen), ""
            except RowError as bad:
                records, reason = [no_record], str(bad)
            for record in records:
                empty = False
                yield {**record, "_file": source.name, "_row": number, REASON: reason}
    if empty:
        names = ", ".join(source.name for source in job.sources)
        raise DataError(f"none of the rows of {names} falls into this split.")


def _record_fields(row: Any, to_record: ToRecord, seen: set[bytes] | None) -> list[dict[str, Any]]:
    """The fields of the row's records, whose digest is added to `seen`.

    Raises:
        RowError: the row is bad, or its records were seen before.
    """
    if isinstance(row, RowError):
        raise row
    made = to_record(row)
    records = [asdict(record) for record in (made if isinstance(made, list) else [made])]
    if seen is not None and records:
        digest = hashlib.sha256(repr(records).encode()).digest()  # 32 bytes per row, however long its texts are
        if digest in seen:
            raise RowError("duplicate of an earlier row")
        seen.add(digest)
    return records


def _report_and_kept(rows: Dataset) -> tuple[RowReport, list[int]]:
    """The report, and the indices of the good rows."""
    columns = rows.select_columns(["_file", "_row", REASON])[:]
    skipped: dict[tuple[str, str], list[int]] = {}
    kept = []
    for index, (file, number, reason) in enumerate(
        zip(columns["_file"], columns["_row"], columns[REASON], strict=True)
    ):
        if reason:
            skipped.setdefault((file, reason), []).append(number)
        else:
            kept.append(index)
    rows_read = (file for (file, _), _ in groupby(zip(columns["_file"], columns["_row"], strict=True)))
    return RowReport(dict(Counter(rows_read)), skipped), kept
