"""Open files that may be compressed (.gz, .zst). A truncated file raises an error instead of appearing to end early."""

import gzip
import importlib.util
import zlib
from collections.abc import Callable
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import DataError, missing_package

COMPRESSED = (".gz", ".zst")
READ_ERRORS = (OSError, EOFError, zlib.error)
"""The exceptions raised while reading a damaged, truncated or unreadable file."""
CHUNK = 1 << 14  # bytes of compressed input decompressed at a time; bounds the output that is held in memory


def without_compression(name: str) -> str:
    """A file name in lower case, without a compression suffix: `rows.jsonl` for `Rows.JSONL.gz`."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


def check_decompressor(path: Path) -> None:
    """Check that the package needed to decompress `path` is installed.

    Raises:
        DataError: `path` ends in `.zst` and the package `zstandard` is missing.
    """
    if path.suffix.lower() == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{missing_package(str(path), 'zstandard', 'zstd')}; or decompress the file")


def open_decompressed(path: Path) -> BufferedIOBase:
    """Open `path` for reading bytes, decompressed if its name ends in `.gz` or `.zst`.

    Raises:
        DataError: the package needed to decompress it is missing.
        OSError: the file cannot be opened.
    """
    check_decompressor(path)
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            from zstandard import ZstdDecompressor, ZstdError

            return BufferedReader(_ZstdReader(path.open("rb"), ZstdDecompressor().decompressobj, ZstdError), CHUNK)
        case _:
            return path.open("rb")


class _ZstdReader(RawIOBase):
    """A stream over consecutive zstd frames.

    The reader of the `zstandard` package takes a truncated last frame for the end of the file; this one raises
    `EOFError`.
    """

    def __init__(self, compressed: BinaryIO, new_decompressor: Callable[[], Any], zstd_error: type[Exception]) -> None:
        self._compressed, self._new_decompressor, self._zstd_error = compressed, new_decompressor, zstd_error
        self._decompressor = new_decompressor()
        self._leftover = b""  # compressed bytes behind the end of the last frame
        self._output, self._position = b"", 0  # decompressed bytes, and how many of them were already read
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next decompressed bytes and return their number; 0 at the end of the file.

        Raises:
            EOFError: the file ends inside a frame.
            OSError: the file is not valid zstd.
        """
        # A chunk of input may give no output yet, so continue until there is some.
        while self._position == len(self._output):
            compressed = self._leftover or self._compressed.read(CHUNK)
            if not compressed:
                if self._inside_frame:
                    raise EOFError("the file ends before the end of a frame")
                return 0
            self._output, self._position = self._decompress(compressed), 0
        count = min(len(buffer), len(self._output) - self._position)
        buffer[:count] = self._output[self._position : self._position + count]
        self._position += count
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        try:
            output: bytes = self._decompressor.decompress(compressed)
        except self._zstd_error as error:
            raise OSError(str(error)) from error
        self._inside_frame, self._leftover = not self._decompressor.eof, self._decompressor.unused_data
        if self._decompressor.eof:
            self._decompressor = self._new_decompressor()  # a decompressor handles a single frame
        return output

    def close(self) -> None:
        """Close the compressed file as well."""
        self._compressed.close()
        super().close()
