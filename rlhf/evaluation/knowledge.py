"""Reads entities and their pages from files, and retrieves the passages of a page for a fact (BM25)."""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf.errors import DataError

SQLITE = (".db", ".sqlite", ".sqlite3")
SEPARATOR = "####SPECIAL####SEPARATOR####"  # between the passages of a page in FActScore's Wikipedia database
NAME_KEYS, TEXT_KEYS = ("entity", "topic", "title", "name"), ("text", "page")


@dataclass(frozen=True)
class Entity:
    """The subject of a question. `page` is its text, if the file of entities contains the pages too."""

    name: str
    page: str | None = None


def read_entities(path: Path) -> list[Entity]:
    """Read entities from a file.

    JSON lines have the name under `entity`, `topic`, `title` or `name`, and optionally the page under `text` or `page`.
    A .txt file has one name per line.

    Raises:
        DataError: There is no such file, a line cannot be read, or the file is empty.
    """
    found = [
        Entity(_required_text(row, NAME_KEYS, path, number), _optional_text(row, TEXT_KEYS))
        for number, row in _read_rows(path)
    ]
    if not found:
        raise DataError(f"{path} names no entity")
    return found


class Knowledge:
    """Retrieves the passages of an entity's page that are relevant to a statement.

    Args:
        entities: The entities, each of which needs a page.
        path: JSON lines, or an SQLite database with a table `documents(title, text)` such as FActScore's. None if the
            entities have their pages.
        words: The number of words in a passage, for pages that are not yet divided into passages (by `SEPARATOR`).

    Raises:
        DataError: The file cannot be read, or an entity has no page.
    """

    def __init__(self, entities: Sequence[Entity], path: Path | None, words: int):
        self.path, self.words = path, words
        self.pages: Mapping[str, str] = {one.name: one.page for one in entities if one.page}
        if path is not None and path.suffix not in SQLITE:
            self.pages = {
                _required_text(row, NAME_KEYS, path, at): _required_text(row, TEXT_KEYS, path, at)
                for at, row in _read_rows(path)
            }
        missing = [one.name for one in entities if not self.page(one.name)]
        if missing:
            where = path or "the file of entities"
            raise DataError(
                f"{where} has no page for {len(missing)} of {len(entities)} entities, such as {missing[0]!r}"
            )

    def page(self, entity: str) -> str | None:
        """Return the text of an entity's page, None if there is none.

        Raises:
            DataError: The database does not exist or has no such table.
        """
        if self.path is None or self.path.suffix not in SQLITE:
            return self.pages.get(entity)
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist")
        try:
            with sqlite3.connect(f"file:{self.path}?mode=ro", uri=True) as connection:
                row = connection.execute("SELECT text FROM documents WHERE title = ?", (entity,)).fetchone()
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path} is not an SQLite database with a table documents(title, text): {error}"
            ) from None
        return row[0] if row else None

    def passages(self, entity: str, fact: str, number: int) -> list[str]:
        """Return the `number` passages of the entity's page with the highest BM25 score for its name and the fact.

        The best one comes first. If the query has only stop words, the first passages of the page are returned.
        """
        import bm25s

        passages, index = self._index(entity)
        number = min(number, len(passages))
        query = bm25s.tokenize([f"{entity} {fact}"], stopwords="en", show_progress=False, return_ids=False)
        order = index.get_scores(query[0]).argsort(kind="stable")[::-1] if query[0] else range(number)
        return [passages[int(i)] for i in order[:number]]

    @lru_cache(maxsize=64)  # noqa: B019  (lives as long as the run)
    def _index(self, entity: str) -> tuple[list[str], Any]:
        """Return the passages of an entity's page and their BM25 index."""
        import bm25s

        page = self.page(entity) or ""
        given = [part.replace("<s>", "").replace("</s>", "").strip() for part in page.split(SEPARATOR)]
        passages = [part for part in given if part] if len(given) > 1 else split_passages(page, self.words)
        index = bm25s.BM25()
        tokens = bm25s.tokenize(passages, stopwords="en", show_progress=False, return_ids=False)
        index.index(tokens, show_progress=False)
        return passages, index


def split_sentences(text: str) -> list[str]:
    """Return the sentences of an English text. A line break always ends a sentence; blank ones are dropped."""
    import pysbd

    segmenter = pysbd.Segmenter(language="en", clean=False)
    return [piece.strip() for line in text.splitlines() for piece in segmenter.segment(line) if piece.strip()]


def split_passages(page: str, words: int) -> list[str]:
    """Divide a page into passages of whole sentences, each of at most `words` words unless one sentence is longer."""
    passages: list[list[str]] = [[]]
    for sentence in split_sentences(page):
        if passages[-1] and sum(len(part.split()) for part in [*passages[-1], sentence]) > words:
            passages.append([])
        passages[-1].append(sentence)
    return [" ".join(passage) for passage in passages]


def _read_rows(path: Path) -> list[tuple[int, Any]]:
    """Return pairs (line number, row) of a JSON-lines or .txt file. Blank lines are skipped."""
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    lines = [
        (number, line) for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if line.strip()
    ]
    if path.suffix == ".txt":
        return [(number, {"entity": line.strip()}) for number, line in lines]
    rows = []
    for number, line in lines:
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
    return rows


def _required_text(row: Any, names: Sequence[str], path: Path, number: int) -> str:
    """Return the text under the first of the keys `names`; raises DataError if there is none."""
    text = _optional_text(row, names)
    if text is None:
        raise DataError(f"{path}, line {number}: no text under {' or '.join(names)}")
    return text


def _optional_text(row: Any, names: Sequence[str]) -> str | None:
    """Return the text or the joined paragraphs under the first of the keys `names` that has a value, else None."""
    values = [row[name] for name in names if isinstance(row, dict) and row.get(name)]
    if values and isinstance(values[0], list):
        return "\n".join(map(str, values[0]))
    return values[0] if values and isinstance(values[0], str) else None
