"""Turn rows into records. Every row read is either kept or reported with its source, number and reason.

A generator decides about each row, and `datasets` caches its output including the reasons, so that the report is the
same whether the rows were just read or came from the cache.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

from datasets import Dataset, Features, Value

from rlhf.data.caching import REASON, cached_rows, code_digest
from rlhf.data.records import Split, columns
from rlhf.data.reports import RowReport, reasons_and_counts
from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError

log = logging.getLogger(__name__)

OnBadRow = Literal["skip", "fail"]
ToRecord = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class _Job:
    """Everything that determines which records the rows become; its pickle is the cache key."""

    sources: tuple[Source, ...]
    to_record: ToRecord
    columns: tuple[str, ...]
    deduplicate: bool
    fingerprints: tuple[str, ...]


def read_records(
    sources: tuple[Source, ...],
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
        to_record: Returns the record of a row (a dataclass instance whose fields are strings) or raises `RowError`. Its
            pickle is part of the cache key (see `cached_rows`).
        split: The split, whose record class gives the columns; with `record`, only a name for messages.
        on_bad_row: `skip` counts and skips bad rows; `fail` raises an error.
        deduplicate: Whether a record equal to an earlier one is a bad row.
        record: The record class, for a data set that assigns the rows to splits itself.

    Returns:
        The records and the report.

    Raises:
        DataError: a source cannot be read, no row can be used, or `on_bad_row` is `fail` and there is a bad row.
    """
    fingerprints = (*(source.fingerprint() for source in sources), code_digest(to_record.__module__))
    names = [field.name for field in fields(record)] if record else columns(cast(Split, split))
    job = _Job(sources, to_record, tuple(names), deduplicate, fingerprints)
    features = {name: Value("string") for name in (*job.columns, "_file", REASON)} | {"_row": Value("int64")}
    rows = cached_rows(_convert_rows, job, Features(features), split)
    report, kept = _report_and_kept(rows)
    if on_bad_row == "fail" and report.skipped:
        (file, reason), numbers = next(iter(report.skipped.items()))
        raise DataError(
            f"{split}: {file}, row {numbers[0]:,}: {reason} (`on_bad_row: skip` skips and counts such rows)."
        )
    if not kept:
        reasons = reasons_and_counts(report.counts)
        raise DataError(f"{split}: no row of {', '.join(report.read)} can be used ({reasons}).")
    for line in report.lines():
        log.warning("%s: %s", split, line)
    return rows.select(kept).select_columns(list(job.columns)), report


def _convert_rows(job: _Job) -> Iterator[dict[str, Any]]:
    """Yield a row for each row read: the fields of its record, or empty fields and the reason why it is bad."""
    no_record = dict.fromkeys(job.columns, "")
    seen: set[bytes] | None = set() if job.deduplicate else None
    for source in job.sources:
        for number, row in source.rows():
            try:
                record, reason = _record_fields(row, job.to_record, seen), ""
            except RowError as bad:
                record, reason = no_record, str(bad)
            yield {**record, "_file": source.name, "_row": number, REASON: reason}


def _record_fields(row: Any, to_record: ToRecord, seen: set[bytes] | None) -> dict[str, str]:
    """The fields of the row's record, whose digest is added to `seen`.

    Raises:
        RowError: the row is bad, or its record was seen before.
    """
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    record = asdict(to_record(row))
    if seen is not None:
        digest = hashlib.sha256(repr(record).encode()).digest()  # 32 bytes per row, however long its texts are
        if digest in seen:
            raise RowError("duplicate of an earlier row")
        seen.add(digest)
    return record


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
    return RowReport(dict(Counter(columns["_file"])), skipped), kept
