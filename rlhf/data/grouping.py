"""Group rows by a key on disk, in bounded memory: a temporary SQLite table and an index over it."""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

CACHE_KIB = 4_096
"""Memory for SQLite's page cache, and for each run of its external sort."""


def grouped_on_disk(
    rows: Iterable[tuple[Any, ...]], columns: str, order: str, folder: Path
) -> Iterator[tuple[Any, Iterable[tuple[Any, ...]]]]:
    """Yield each value of the first column with the rows that have it.

    Args:
        rows: All rows; they are read to the end before the first group is yielded.
        columns: The column definitions in SQL, such as `thread INT, title`.
        order: The columns to sort by, the first column first.
        folder: Where the temporary file is written; it takes about the size of the rows.
    """
    with closing(_new_table(folder, columns)) as database:
        marks = ", ".join("?" * len(columns.split(",")))
        database.executemany(f"INSERT INTO store VALUES ({marks})", rows)
        # Reading by an index over the short columns; sorting the rows themselves would copy their texts.
        database.execute(f"CREATE INDEX sorted ON store ({order})")
        found = database.execute(f"SELECT * FROM store INDEXED BY sorted ORDER BY {order}")
        yield from groupby(found, key=itemgetter(0))


def _new_table(folder: Path, columns: str) -> sqlite3.Connection:
    """An empty table `store` with an open transaction.

    The file is used once and then deleted, so there is neither a journal nor a wait for the disk.
    """
    database = sqlite3.connect(folder / "store.sqlite", isolation_level=None)
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}"):
        database.execute(f"PRAGMA {pragma}")
    database.execute("DROP TABLE IF EXISTS store")
    database.execute(f"CREATE TABLE store ({columns})")
    database.execute("BEGIN")  # one transaction for all rows; otherwise each insert is a transaction of its own
    return database
