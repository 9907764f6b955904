"""Pages about entities, from JSONL or SQLite, and the passages of a page that bear on a fact (BM25)."""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf.errors import DataError

SQLITE = (".db", ".sqlite", ".sqlite3")
SEPARATOR = "####SPECIAL####SEPARATOR####"  # between the passages of a page in FActScore's own Wikipedia database
NAMES, TEXTS = ("entity", "topic", "title", "name"), ("text", "page")


@dataclass(frozen=True)
class Entity:
    """Somebody or something to be asked about; `page` where the list of entities holds the pages too."""

    name: str
    page: str | None = None


def read_entities(path: Path) -> list[Entity]:
    """Entities from JSONL (`entity`, `topic`, `title` or `name`; maybe `text` or `page`), or .txt, a name a line.

    Raises:
        DataError: there is no such file, a line is not understood, or there is no line.
    """
    found = [Entity(_field(row, NAMES, path, number), _text(row, TEXTS)) for number, row in _rows(path)]
    if not found:
        raise DataError(f"{path} names no entity")
    return found


class Knowledge:
    """Passages of an entity's page that bear on a statement, best first.

    Pages come from the entities themselves, from JSONL, or from the table `documents(title, text)` of an SQLite
    database, as FActScore publishes one. A page without separators is cut at sentences into passages of at most
    `words` words.
    """

    def __init__(self, entities: Sequence[Entity], path: Path | None, words: int):
        self.path, self.words = path, words
        self.pages: Mapping[str, str] = {one.name: one.page for one in entities if one.page}
        if path is not None and path.suffix not in SQLITE:
            self.pages = {_field(row, NAMES, path, at): _field(row, TEXTS, path, at) for at, row in _rows(path)}
        missing = [one.name for one in entities if not self.page(one.name)]
        if missing:
            where = path or "the file of entities"
            raise DataError(
                f"{where} has no page for {len(missing)} of {len(entities)} entities, such as {missing[0]!r}"
            )

    def page(self, entity: str) -> str | None:
        """The text of the page with this title."""
        if self.path is None or self.path.suffix not in SQLITE:
            return self.pages.get(entity)
        if not self.path.is_file():
            raise DataError(f"{self.path} does not exist")
        try:
            with sqlite3.connect(f"file:{self.path}?mode=ro", uri=True) as connection:
                row = connection.execute("SELECT text FROM documents WHERE title = ?", (entity,)).fetchone()
        except sqlite3.Error as error:
            raise DataError(f"{self.path} is no SQLite database with a table documents(title, text): {error}") from None
        return row[0] if row else None

    def passages(self, entity: str, fact: str, number: int) -> list[str]:
        """The `number` passages of the page that fit `entity` and `fact` best."""
        import bm25s

        passages, index = self._index(entity)
        number = min(number, len(passages))
        query = bm25s.tokenize([f"{entity} {fact}"], stopwords="en", show_progress=False, return_ids=False)
        order = index.get_scores(query[0]).argsort(kind="stable")[::-1] if query[0] else range(number)
        return [passages[int(i)] for i in order[:number]]

    @lru_cache(maxsize=64)  # noqa: B019  (lives as long as the run)
    def _index(self, entity: str) -> tuple[list[str], Any]:
        import bm25s

        page = self.page(entity) or ""
        given = [part.replace("<s>", "").replace("</s>", "").strip() for part in page.split(SEPARATOR)]
        passages = [part for part in given if part] if len(given) > 1 else cut(page, self.words)
        index = bm25s.BM25()
        tokens = bm25s.tokenize(passages, stopwords="en", show_progress=False, return_ids=False)
        index.index(tokens, show_progress=False)
        return passages, index


def sentences(text: str) -> list[str]:
    """The sentences of an English text, line by line, without what is only white space."""
    import pysbd

    segmenter = pysbd.Segmenter(language="en", clean=False)
    return [piece.strip() for line in text.splitlines() for piece in segmenter.segment(line) if piece.strip()]


def cut(page: str, words: int) -> list[str]:
    """Whole sentences, together at most `words` words a passage unless a sentence alone is longer."""
    passages: list[list[str]] = [[]]
    for sentence in sentences(page):
        if passages[-1] and sum(len(part.split()) for part in [*passages[-1], sentence]) > words:
            passages.append([])
        passages[-1].append(sentence)
    return [" ".join(passage) for passage in passages]


def _rows(path: Path) -> list[tuple[int, Any]]:
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


def _field(row: Any, names: Sequence[str], path: Path, number: int) -> str:
    text = _text(row, names)
    if text is None:
        raise DataError(f"{path}, line {number}: no text under {' or '.join(names)}")
    return text


def _text(row: Any, names: Sequence[str]) -> str | None:
    """The first of the names that holds a text, or a list of paragraphs."""
    values = [row[name] for name in names if isinstance(row, dict) and row.get(name)]
    if values and isinstance(values[0], list):
        return "\n".join(map(str, values[0]))
    return values[0] if values and isinstance(values[0], str) else None
