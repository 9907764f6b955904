"""Read the rows of `.jsonl`, `.json`, `.csv` and `.tsv` files one by one.

A malformed row is yielded as a `RowError` and the next rows are still read. A file that cannot be read to its end
raises `DataError`. Rows are numbered from 1; in a `.jsonl` file the number is that of the line.
"""

import csv
import json
from collections.abc import Iterator
from io import BufferedIOBase, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf.data.compression import READ_ERRORS, open_decompressed
from rlhf.errors import DataError, RowError

MAX_LINE = 16_000_000
"""Longest line of a `.jsonl` file in bytes, and longest field of a `.csv` or `.tsv` file in characters.

A longer line is a bad row and is never held in memory as a whole. A longer field makes the rest of the file unreadable.
"""


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the line number and value of each line that is not blank.

    Raises:
        DataError: the file cannot be read to its end.
    """
    number = 0
    try:
        with open_decompressed(path) as stream:
            for number, line in enumerate(_bounded_lines(stream), start=1):
                if line.strip():
                    yield number, _parse_json_line(line)
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read beyond row {number:,}: {error}.") from error


def read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield the number and the fields, by column name, of each row below the header.

    Every field is a string. Types inferred per column would make a row's value depend on the other rows.

    Raises:
        DataError: the file cannot be read to its end, is not UTF-8, has an unclosed quote, or has a repeated column.
    """
    number = 0
    csv.field_size_limit(MAX_LINE)
    try:
        with open_decompressed(path) as stream, TextIOWrapper(cast(BinaryIO, stream), "utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path} names a column twice in its header.")
            for number, row in enumerate(filter(None, reader), start=1):  # a blank line gives an empty list
                if len(row) == len(header):
                    yield number, dict(zip(header, row, strict=True))
                else:
                    yield number, RowError(f"{'more' if len(row) > len(header) else 'fewer'} fields than the header")
    except (*READ_ERRORS, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read beyond row {number:,}: {error}.") from error


def read_json_list(path: Path) -> list[Any]:
    """The rows of a file that contains one JSON list. The whole file is held in memory.

    Raises:
        DataError: the file cannot be read, is not valid JSON, or does not contain a list.
    """
    try:
        with open_decompressed(path) as stream:
            rows = json.loads(stream.read().decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error} (for one row per line, name the file .jsonl).") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} does not contain a list of rows (for one row per line, name the file .jsonl).")
    return rows


def _bounded_lines(stream: BufferedIOBase) -> Iterator[bytes]:
    """Yield lines, truncated to `MAX_LINE` + 1 bytes: a length above `MAX_LINE` marks a line that was too long."""
    while line := stream.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE + 1)
        yield line


def _parse_json_line(line: bytes) -> Any:
    if len(line) > MAX_LINE:
        return RowError(f"longer than {MAX_LINE:,} bytes")
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except (ValueError, RecursionError):
        return RowError("malformed JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> "dict[str, Any] | RowError":
    """The object with these keys and values, or a `RowError` if a key occurs twice: either value could be meant."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else RowError("a key that occurs twice")
