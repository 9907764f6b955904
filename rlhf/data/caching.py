"""Rows made by a generator and kept in the cache of `datasets`, keyed by everything that determines them."""

import errno
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, NamedSplit
from datasets.exceptions import DatasetGenerationError

from rlhf.errors import DataError

REASON = "_reason"
"""The column with the reason why a row cannot be used; empty for a good row."""
BATCH = 200
"""Rows per record batch: how many are in memory while they are written, and while they are read again."""


def cached_rows(
    generator: Callable[[Any], Iterator[dict[str, Any]]], job: Any, features: Features, name: str
) -> Dataset:
    """The rows that `generator(job=job)` yields, from the cache of `datasets` if they are there, else generated.

    Args:
        generator: Yields the rows.
        job: Everything that determines the rows, files and code included. Its pickle is the cache key, so it must be
            the same in every process; the order of a frozenset of strings, for example, is not.
        features: The columns and their types.
        name: The name of the split in the cache and in messages.

    Raises:
        DataError: raised by the generator, or the cache cannot be read.
    """
    try:
        return Dataset.from_generator(
            generator, features=features, gen_kwargs={"job": job}, split=NamedSplit(name), writer_batch_size=BATCH
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    except (AttributeError, OSError, ValueError) as error:  # Arrow raises subclasses of OSError and ValueError
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk is not a damaged cache
        folder, reason = Path(datasets.config.HF_DATASETS_CACHE, "generator"), next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{name}: the rows cannot be read from the cache of `datasets` ({type(error).__name__}: {reason}): delete "
            f"{folder}, which contains only copies of rows, and they are read from their sources again."
        ) from error


def code_digest(module: str = __name__) -> str:
    """SHA-256 of the code in this folder and of `module`, so that rows cached by an older version are not reused."""
    files = {
        *Path(__file__).parent.glob("*.py"),
        Path(getattr(sys.modules[module], "__file__", None) or __file__),
    }
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
