"""Files as bytes, whatever they are packed in: what cannot be unpacked is an error, never an end that came early."""

import gzip
import importlib.util
import zlib
from collections.abc import Callable
from io import BufferedIOBase, BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import DataError

PACKINGS = (".gz", ".zst")
BROKEN = (OSError, EOFError, zlib.error)
"""What reading a damaged, truncated or forbidden file raises."""
CHUNK = 1 << 14  # bytes: what one of them unpacks to is in memory


def unpacked_name(name: str) -> str:
    """A file's name in lower case and without the suffix of its packing: `rows.jsonl` of `Rows.JSONL.gz`."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in PACKINGS if name.endswith(suffix)), name)


def check_packing(path: Path) -> None:
    """See that the file can be unpacked here.

    Raises:
        DataError: a `.zst` file, and there is no package for it.
    """
    if path.suffix.lower() == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(f"{path} needs the package zstandard: pip install 'rlhf[zstd]', or unpack the file.")


def open_file(path: Path) -> BufferedIOBase:
    """Its bytes, unpacked if the name ends in .gz or .zst.

    Raises:
        DataError: there is no package to unpack it.
    """
    check_packing(path)
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".zst":
            from zstandard import ZstdDecompressor, ZstdError

            return BufferedReader(_Unpacked(path.open("rb"), ZstdDecompressor().decompressobj, ZstdError), CHUNK)
        case _:
            return path.open("rb")


class _Unpacked(RawIOBase):
    """Frames, one after the other; unlike zstandard's own reader this one notices that the last is not complete."""

    def __init__(self, packed: BinaryIO, new_frame: Callable[[], Any], error: type[Exception]) -> None:
        self._packed, self._new_frame, self._error = packed, new_frame, error
        self._frame, self._rest, self._ready, self._place = new_frame(), b"", b"", 0
        self._within = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what comes next; 0 at the end."""
        while self._place == len(self._ready):
            packed = self._rest or self._packed.read(CHUNK)
            if not packed:
                if self._within:
                    raise EOFError("the file ends before the end of a frame")
                return 0
            self._ready, self._place = self._unpack(packed), 0
        count = min(len(buffer), len(self._ready) - self._place)
        buffer[:count] = self._ready[self._place : self._place + count]
        self._place += count
        return count

    def _unpack(self, packed: bytes) -> bytes:
        try:
            ready: bytes = self._frame.decompress(packed)
        except self._error as error:
            raise OSError(str(error)) from error
        self._within, self._rest = not self._frame.eof, self._frame.unused_data
        if self._frame.eof:
            self._frame = self._new_frame()
        return ready

    def close(self) -> None:
        """Close the packed file too."""
        self._packed.close()
        super().close()
