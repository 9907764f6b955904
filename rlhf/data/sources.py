"""Where rows come from: a local file, a file in a Hub repository or a Hub data set, and which slice of its rows.

`.jsonl`, `.json`, `.csv` and `.tsv` files are read by `rlhf.data.row_files`, so that a malformed row is one bad row
and does not make the whole file unusable. Parquet files and the Hub are read by `datasets.load_dataset`.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from rlhf.data.compression import COMPRESSED, check_decompressor, without_compression
from rlhf.data.row_files import read_csv, read_json_list, read_jsonl
from rlhf.errors import DataError, RowError

FORMATS = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*(f"{suffix}{compressed}" for suffix in FORMATS for compressed in ("", *COMPRESSED)), ".parquet")
"""The suffixes of readable files; compared without regard to case."""
ALLOWED = f"{', '.join(FORMATS)} (each also with {' or '.join(COMPRESSED)}), .parquet"

_SLICE = re.compile(r"\[(\d*):(\d*)\]")
_HUB_FILE = re.compile(r"(?:.*/)?hf:/{1,2}(datasets/.+)")  # `Path` collapses the two slashes of a URL into one
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))??(?::([\w.+-]+))?")


@dataclass(frozen=True)
class Source:
    """A source of rows.

    Attributes:
        name: The source as configured, for messages.
        path: A local file, or None.
        hub: The arguments of `datasets.load_dataset` if `path` is None.
        start: Index of the first row to take, from 0.
        stop: Index after the last row to take; None for all.
    """

    name: str
    path: Path | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, spec: Any, root: Path) -> "Source":
        """Parse the specification of a source.

        Args:
            spec: A file name relative to `root`; a Hub id `owner/name[@revision][:config][:split]`; or a mapping of
                arguments for `datasets.load_dataset`, with at least `path`. The revision is a branch, tag or commit of
                the Hub; the split is `train` if not given. A file name or Hub id may end in a slice `[start:stop]`. A
                file may also be in a Hub repository (`hf://datasets/owner/name[@revision]/file.json`).
            root: The folder of the files; it may be in a Hub repository as well.

        Raises:
            DataError: a malformed slice, a mapping without `path`, or a value of another type.
        """
        # 1. Arguments of `load_dataset`.
        if isinstance(spec, Mapping) and isinstance(spec.get("path"), str):
            return cls(":".join(str(spec[key]) for key in ("path", "name", "split") if spec.get(key)), hub={**spec})
        if not isinstance(spec, str) or not spec:
            raise DataError(f"{spec!r} is not a data source: name a file, a Hub id or a mapping with `path`.")
        # 2. The slice. A bracket in the name of a folder (before a slash) does not start one.
        name, window = cast(re.Match[str], re.fullmatch(r"(.+?)(\[[^/]*)?", spec, re.DOTALL)).groups()
        start, stop = _parse_slice(spec, window) if window else (0, None)
        path = root / os.path.expanduser(name)
        is_file = name.lower().endswith(SUFFIXES)
        # 3. A file in a Hub repository.
        hub_file = _HUB_FILE.fullmatch(str(path))
        if hub_file and is_file:
            url = f"hf://{hub_file[1]}"
            return cls(f"{url}{window or ''}", hub=_load_arguments(url), start=start, stop=stop)
        # 4. A local file. An existing path wins over a Hub id of the same spelling.
        hub_id = _HUB_ID.fullmatch(name)
        if hub_id is None or is_file or os.path.exists(path):
            return cls(spec, path, start=start, stop=stop)
        # 5. A Hub id.
        arguments = dict(zip(("path", "revision", "name", "split"), hub_id.groups(), strict=True))
        return cls(spec, None, {key: value for key, value in arguments.items() if value}, start, stop)

    def check(self) -> None:
        """Check without reading it that a local file can be read. A Hub id is looked up only when it is loaded.

        Raises:
            DataError: the path does not exist, is a directory, has an unknown suffix, or is an empty file; or the
                package to decompress it is missing.
        """
        if self.path is None:
            return
        if not os.path.exists(self.path):
            allowed = "name a file, or a Hub id as owner/name[@revision][:config][:split]"
            raise DataError(f"{self.path} does not exist: {allowed}.")
        if not self.path.is_file():
            raise DataError(f"{self.path} is not a file; allowed: a file that ends in {ALLOWED}.")
        if not self.path.name.lower().endswith(SUFFIXES):
            raise DataError(f"{self.path} has an unknown suffix; allowed: {ALLOWED}.")
        check_decompressor(self.path)
        if not self.path.stat().st_size:
            raise DataError(f"{self.path} is empty.")

    def fingerprint(self) -> str:
        """A string that changes when the rows change: the SHA-256 of a file, or the fingerprint of a Hub data set.

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
        """Yield the number of each row of the slice, and its fields or a `RowError` if it is not a readable object.

        Rows are numbered from 1 within the whole source; in a `.jsonl` file the number is that of the line.

        Raises:
            DataError: the source cannot be read to its end, or the slice has no rows.
        """
        empty = True
        for number, row in islice(self._all_rows(), self.start, self.stop):
            empty = False
            yield number, row if isinstance(row, Mapping | RowError) else RowError("not a JSON object")
        if empty:
            raise DataError(f"{self.path or self.name} has no rows{' in that slice' if self.start else ''}.")

    def _all_rows(self) -> Iterator[tuple[int, Any]]:
        if self.path is None:
            return enumerate(self._load(**self.hub), start=1)
        match _format_of(self.path.name):
            case "jsonl":
                return read_jsonl(self.path)
            case "json":
                return enumerate(read_json_list(self.path), start=1)
            case "csv":
                return read_csv(self.path, ",")
            case "tsv":
                return read_csv(self.path, "\t")
            case builder:
                return enumerate(self._load(builder, data_files=str(self.path)), start=1)

    def _load(self, path: str, **arguments: Any) -> Dataset:
        try:
            return load_dataset(path, **{"split": "train", **arguments})
        except Exception as error:  # no network, an unknown config, a broken file, …: always a problem with the data
            reason = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
            first_line = next(iter(str(reason).splitlines()), "")
            raise DataError(f"{self.name} cannot be loaded ({type(reason).__name__}: {first_line})") from error


def _format_of(name: str) -> str:
    """The suffix of a file name without its dot and without a compression suffix: `jsonl` for `rows.jsonl.gz`."""
    return without_compression(name).rpartition(".")[2]


def _load_arguments(url: str) -> dict[str, Any]:
    """The arguments of `load_dataset` for one file in a Hub repository."""
    suffix = _format_of(url)
    builder = {"jsonl": "json", "tsv": "csv"}.get(suffix, suffix)
    return {"path": builder, "data_files": url} | ({"sep": "\t"} if suffix == "tsv" else {})


def _parse_slice(spec: str, window: str) -> tuple[int, int | None]:
    """The bounds in `window`, such as `[10:20]`; `spec` is for the message."""
    found = _SLICE.fullmatch(window)
    start, stop = (int(bound) if bound else None for bound in found.groups()) if found else (0, 0)
    if stop is not None and stop <= (start or 0):
        raise DataError(f"{spec!r} ends in a malformed slice: write [start:stop] with 0 <= start < stop, e.g. [:6000].")
    return start or 0, stop
