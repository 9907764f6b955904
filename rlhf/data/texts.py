"""Plain texts from a file or the Hub: what a model is kept good at, or measured on."""

import logging
from pathlib import Path

from rlhf.data.fields import text_field
from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError

log = logging.getLogger(__name__)


def check_texts(key: str, spec: str) -> None:
    """Check that a local file of texts is there, without reading it.

    Raises:
        DataError: it is missing, or has an unknown suffix.
    """
    try:
        Source.parse(spec, Path()).check()
    except DataError as error:
        raise DataError(f"{key}={spec}: {error}") from error


def read_texts(key: str, spec: str) -> list[str]:
    """The column `text` of a file or a data set of the Hub, or of a slice of its rows: `texts.jsonl[:100]`.

    Raises:
        DataError: it cannot be read, or no row has a text.
    """
    texts: list[str] = []
    bad = 0
    for _, row in Source.parse(spec, Path()).rows():
        try:
            if isinstance(row, RowError):
                raise row
            texts.append(text_field(row, "text"))
        except RowError:
            bad += 1
    if not texts:
        raise DataError(f"{key}={spec}: no row has a column text with a text in it")
    if bad:
        log.warning("%s=%s: %d rows without a text are skipped", key, spec, bad)
    return texts
