"""Where rows come from: a local file or the Hub, and which of its rows.

`.jsonl`, `.csv` and `.tsv` files are read row by row, so that one malformed row is one bad row and not a failed file.
Parquet and the Hub are left to `datasets.load_dataset`.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase, TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from rlhf.data.packing import BROKEN, PACKINGS, check_packing, open_file, unpacked_name
from rlhf.errors import DataError, RowError

FORMATS = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*(f"{suffix}{packing}" for suffix in FORMATS for packing in ("", *PACKINGS)), ".parquet")
"""What names of files end in, in capitals or not."""
NAMED = f"{', '.join(FORMATS)} (each also with {' or '.join(PACKINGS)}), .parquet"
MAX_LINE = 16_000_000
"""Longest line of a `.jsonl` file in bytes: what is longer is a bad row, and never held in memory."""

_SLICE = re.compile(r"\[(\d*):(\d*)\]")
_HUB_FILE = re.compile(r"(?:.*/)?hf:/{1,2}(datasets/.+)")  # `Path` folds the two slashes of a URL into one
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))??(?::([\w.+-]+))?")


@dataclass(frozen=True)
class Source:
    """A file (`path`) or the arguments of `datasets.load_dataset` (`hub`), and the slice of its rows to take."""

    name: str
    path: Path | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, spec: Any, root: Path) -> "Source":
        """Understand a file below `root` or `owner/name[:config][:split]`, each with `[start:stop]`, or a mapping.

        A file may be in a Hub repository (`hf://datasets/owner/name/file.json`), and `root` may be one. A mapping
        holds arguments of `datasets.load_dataset`, whose `split` is `train` unless given.

        Raises:
            DataError: a malformed slice, a mapping without `path`, or something that is no source at all.
        """
        if isinstance(spec, Mapping) and isinstance(spec.get("path"), str):
            return cls(":".join(str(spec[key]) for key in ("path", "name", "split") if spec.get(key)), hub={**spec})
        if not isinstance(spec, str) or not spec:
            raise DataError(f"{spec!r} is no data source: name a file, a Hub id or a mapping with `path`.")
        name, window = cast(re.Match[str], re.fullmatch(r"(.+?)(\[[^/]*)?", spec, re.DOTALL)).groups()
        start, stop = _parse_slice(spec, window) if window else (0, None)
        path = root / os.path.expanduser(name)
        hub_file = _HUB_FILE.fullmatch(str(path))
        is_file = name.lower().endswith(SUFFIXES)
        if hub_file and is_file:
            url = f"hf://{hub_file[1]}"
            suffix = unpacked_name(name).rpartition(".")[2]
            builder = {"jsonl": "json", "tsv": "csv"}.get(suffix, suffix)
            hub_arguments = {"path": builder, "data_files": url} | ({"sep": "\t"} if suffix == "tsv" else {})
            return cls(f"{url}{window or ''}", hub=hub_arguments, start=start, stop=stop)
        hub = _HUB_ID.fullmatch(name)
        if hub is None or is_file or os.path.exists(path):
            return cls(spec, path, start=start, stop=stop)
        arguments = dict(zip(("path", "name", "split"), hub.groups(), strict=True))
        return cls(spec, None, {key: value for key, value in arguments.items() if value}, start, stop)

    def check(self) -> None:
        """See, without reading it, that a file is there; a Hub id is looked up only when it is loaded.

        Raises:
            DataError: a missing path, a directory, an unknown suffix or an empty file.
        """
        if self.path is None:
            return
        if not os.path.exists(self.path):
            raise DataError(f"{self.path} does not exist: name a file, or a Hub id as owner/name[:config][:split].")
        if not self.path.is_file():
            raise DataError(f"{self.path} is not a file: name one that ends in {NAMED}.")
        if not self.path.name.lower().endswith(SUFFIXES):
            raise DataError(f"{self.path} ends in none of {NAMED}.")
        check_packing(self.path)
        if not self.path.stat().st_size:
            raise DataError(f"{self.path} is empty.")

    def fingerprint(self) -> str:
        """What changes when the rows change: a digest of the file's bytes, or the Hub data set's own fingerprint.

        Raises:
            DataError: the source cannot be read.
        """
        self.check()
        if self.path is None:
            return str(self._load(**self.hub)._fingerprint)
        try:
            with self.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}.") from error

    def rows(self) -> Iterator[tuple[int, Any]]:
        """The rows and their numbers from 1 (in a `.jsonl` file, line numbers); a `RowError` for what cannot be parsed.

        Raises:
            DataError: the source cannot be read to its end, or has no rows.
        """
        empty = True
        for numbered in islice(self._all_rows(), self.start, self.stop):
            empty = False
            yield numbered
        if empty:
            raise DataError(f"{self.path or self.name} has no rows{' in that slice' if self.start else ''}.")

    def _all_rows(self) -> Iterator[tuple[int, Any]]:
        if self.path is None:
            return enumerate(self._load(**self.hub), start=1)
        match unpacked_name(self.path.name).rpartition(".")[2]:
            case "jsonl":
                return _read_lines(self.path)
            case "json":
                return enumerate(_read_list(self.path), start=1)
            case "csv":
                return _read_csv(self.path, ",")
            case "tsv":
                return _read_csv(self.path, "\t")
            case suffix:
                return enumerate(self._load(suffix, data_files=str(self.path)), start=1)

    def _load(self, path: str, **arguments: Any) -> Dataset:
        try:
            return load_dataset(path, **{"split": "train", **arguments})
        except Exception as error:  # no network, no such config, a broken file, …: whatever it is, it is about the data
            reason = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
            first_line = next(iter(str(reason).splitlines()), "")
            raise DataError(f"{self.name} cannot be loaded ({type(reason).__name__}: {first_line})") from error


def _parse_slice(spec: str, window: str) -> tuple[int, int | None]:
    found = _SLICE.fullmatch(window)
    start, stop = (int(bound) if bound else None for bound in found.groups()) if found else (0, 0)
    if stop is not None and stop <= (start or 0):
        raise DataError(f"{spec!r} ends in a malformed slice: write [start:stop] with 0 <= start < stop, e.g. [:6000].")
    return start or 0, stop


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with open_file(path) as stream:
            for number, line in enumerate(_bounded_lines(stream), start=1):
                if line.strip():  # a blank line is no row
                    yield number, _parse_line(line)
    except BROKEN as error:
        raise DataError(f"{path} cannot be read beyond row {number:,}: {error}.") from error


def _bounded_lines(stream: BufferedIOBase) -> Iterator[bytes]:
    """Lines, those longer than `MAX_LINE` cut off there, which their length then tells."""
    while line := stream.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE + 1)
        yield line


def _parse_line(line: bytes) -> Any:
    if len(line) > MAX_LINE:
        return RowError(f"longer than {MAX_LINE:,} bytes")
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        return RowError("not UTF-8")
    except (ValueError, RecursionError):
        return RowError("malformed JSON")


def _object(pairs: list[tuple[str, Any]]) -> "dict[str, Any] | RowError":
    """A JSON object; of two values under one key nobody can say which was meant."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else RowError("a key that occurs twice")


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Every field is text: types guessed by column would depend on the other rows."""
    number = 0
    csv.field_size_limit(MAX_LINE)
    try:
        with open_file(path) as stream, TextIOWrapper(cast(BinaryIO, stream), "utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path} names a column twice in its first row.")
            for number, row in enumerate(filter(None, reader), start=1):
                yield number, dict(zip(header, row, strict=True)) if len(row) == len(header) else _ragged(row, header)
    except (*BROKEN, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read beyond row {number:,}: {error}.") from error


def _ragged(row: list[str], header: list[str]) -> RowError:
    return RowError(f"{'more' if len(row) > len(header) else 'fewer'} fields than the first row names")


def _read_list(path: Path) -> list[Any]:
    try:
        with open_file(path) as stream:
            rows = json.loads(stream.read().decode("utf-8-sig"), object_pairs_hook=_object)
    except BROKEN as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error} (one row a line is called .jsonl).") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no list of rows (one row a line is called .jsonl).")
    return rows
