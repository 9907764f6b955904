"""Questions with their answers and pairs, from a dump's `Posts.xml` or from pairs: joined on disk, never in memory.

In a dump an answer stands anywhere behind its question, so the posts go through a temporary SQLite file whose caches
have a fixed size. What is in memory at a time is one question with all its answers.
"""

import hashlib
import os
import random
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import combinations, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from rlhf.data.markdown import to_markdown
from rlhf.data.packing import check_packing
from rlhf.data.posts import read_posts, score
from rlhf.data.reading import text
from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError

CACHE_KIB = 4_096
"""Memory for SQLite's pages, and for each run of its sorting on disk."""


@dataclass(frozen=True, slots=True)
class Thread:
    """A question, its answers (the best first), and pairs of them: answer `better[k]` beats answer `worse[k]`."""

    id: str
    question: str
    answers: list[str]
    better: list[int]
    worse: list[int]


@dataclass(frozen=True)
class Pairing:
    """At most `limit` pairs a question, drawn by `seed`; `title` puts a question's title above its text."""

    limit: int = 10
    seed: int = 0
    title: bool = False

    def draw(self, pairs: Sequence[tuple[int, int]], key: str) -> tuple[list[int], list[int]]:
        """The better and the worse ones of the pairs drawn; the draw depends on seed and key alone."""
        drawn = random.Random(f"{self.seed}/{key}").sample(pairs, min(self.limit, len(pairs)))
        return [better for better, _ in drawn], [worse for _, worse in drawn]


@dataclass
class Tally:
    """What became of the rows of one source: counts by kind, and of the bad ones by reason, with the first rows."""

    rows: int = 0
    questions: int = 0
    answers: int = 0
    pairs: int = 0
    other: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, row: int, reason: RowError | str) -> None:
        """Count a bad row, in bounded memory: of the row numbers only the first three are kept."""
        self.skipped[str(reason)] = self.skipped.get(str(reason), 0) + 1
        self.first[str(reason)] = sorted([*self.first.get(str(reason), []), row])[:3]


@dataclass(frozen=True)
class Dump:
    """A site's `Posts.xml`, as in the dumps of Stack Exchange, maybe gzipped."""

    name: str
    path: Path

    def check(self) -> None:
        """See that the file is there.

        Raises:
            DataError: it is missing, no file or empty.
        """
        if not os.path.isfile(self.path):
            raise DataError(f"{self.path} does not exist: name a site's Posts.xml, Posts.xml.gz or Posts.xml.zst.")
        if not self.path.stat().st_size:
            raise DataError(f"{self.path} is empty.")
        check_packing(self.path)

    def stamp(self) -> str:
        """What changes when the file does."""
        return _stamp(self.path)

    def threads(self, tally: Tally, pairing: Pairing, work: Path) -> Iterator[Thread]:
        """Its questions, in the order of their ids, with their answers."""
        with closing(
            _store(work, "thread INT, answer INT, row INT, id INT, votes INT, accepted INT, title, body")
        ) as db:
            db.executemany("INSERT INTO store VALUES (?, ?, ?, ?, ?, ?, ?, ?)", self._posts(tally))
            for identity, posts in _grouped(db, "thread, answer, row"):
                thread = _thread_of_posts(str(identity), posts, tally, pairing)
                if thread:
                    yield thread

    def _posts(self, tally: Tally) -> Iterator[tuple[Any, ...]]:
        for tally.rows, post in read_posts(self.path):
            if isinstance(post, RowError):
                tally.skip(tally.rows, post)
            elif post is None:
                tally.other += 1
            else:
                fields = (post.id, post.votes, post.accepted, post.title, post.body)
                yield post.question, post.is_answer, tally.rows, *fields


@dataclass(frozen=True)
class Pairs:
    """Rows with `question`, `response_j` (the better one), `response_k` and maybe `qid`: stack-exchange-paired's."""

    source: Source

    @property
    def name(self) -> str:
        """As configured."""
        return self.source.name

    def check(self) -> None:
        """See that a file is there.

        Raises:
            DataError: it is missing, of an unknown format or empty.
        """
        self.source.check()

    def stamp(self) -> str:
        """What changes when the rows do."""
        return self.source.fingerprint() if self.source.path is None else _stamp(self.source.path)

    def threads(self, tally: Tally, pairing: Pairing, work: Path) -> Iterator[Thread]:
        """Its questions, each with the answers of all its pairs."""
        with closing(_store(work, "thread TEXT, row INT, question, better, worse")) as db:
            db.executemany("INSERT INTO store VALUES (?, ?, ?, ?, ?)", self._rows(tally))
            for thread, rows in _grouped(db, "thread, row"):
                yield _thread_of_pairs(thread, rows, tally, pairing)

    def _rows(self, tally: Tally) -> Iterator[tuple[Any, ...]]:
        for number, row in self.source.rows():
            tally.rows += 1
            try:
                yield _pair(number, row)
            except RowError as bad:
                tally.skip(number, bad)


def _stamp(path: Path) -> str:
    stat = path.stat()  # a dump is too large to be read twice; the time of change of its inode cannot be set back
    return f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _store(work: Path, columns: str) -> sqlite3.Connection:
    """A table on disk that is used once: no journal, no waiting for the disk."""
    db = sqlite3.connect(work / "store.sqlite", isolation_level=None)
    for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{CACHE_KIB}"):
        db.execute(f"PRAGMA {pragma}")
    db.execute("DROP TABLE IF EXISTS store")
    db.execute(f"CREATE TABLE store ({columns})")
    db.execute("BEGIN")  # one transaction, or every row would be one
    return db


def _grouped(db: sqlite3.Connection, order: str) -> Iterator[tuple[Any, Iterable[tuple[Any, ...]]]]:
    """The rows by their first column, in `order`: by an index, as sorting the texts themselves would copy them."""
    db.execute(f"CREATE INDEX sorted ON store ({order})")
    return groupby(db.execute(f"SELECT * FROM store INDEXED BY sorted ORDER BY {order}"), key=itemgetter(0))


def _thread_of_posts(id: str, posts: Iterable[tuple[Any, ...]], tally: Tally, pairing: Pairing) -> Thread | None:
    question: str | None = None
    chosen, seen = None, set()
    answers: list[tuple[int, int, int, str]] = []
    for _, is_answer, row, identity, votes, accepted, title, body in posts:
        try:
            if identity in seen:
                raise RowError("duplicate `Id`")
            seen.add(identity)
            markdown = _body(body)
            if not is_answer:
                question, chosen = f"{title}\n\n{markdown}" if pairing.title and title else markdown, accepted
            elif question is None:
                raise RowError("its question is missing or cannot be used")
            else:
                answers.append((-score(votes, identity == chosen), -votes, row, markdown))
        except RowError as bad:
            tally.skip(row, bad)
    if question is None:
        return None
    answers.sort()
    pairs = [(i, j) for i, j in combinations(range(len(answers)), 2) if answers[i][0] < answers[j][0]]
    return _thread(id, question, [answer[-1] for answer in answers], pairs, tally, pairing)


def _body(html: str) -> str:
    markdown = to_markdown(html)
    if not markdown:
        raise RowError("empty `Body`")
    return markdown


def _pair(number: int, row: Any) -> tuple[str, int, str, str, str]:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    question, better, worse = text(row, "question"), text(row, "response_j"), text(row, "response_k")
    if better == worse:
        raise RowError("`response_j` and `response_k` are identical")
    identity = row.get("qid")
    thread = hashlib.sha256(question.encode()).hexdigest()[:16] if identity is None else str(identity)
    return thread, number, question, better, worse


def _thread_of_pairs(thread: str, rows: Iterable[tuple[Any, ...]], tally: Tally, pairing: Pairing) -> Thread:
    pairs: dict[tuple[str, str], None] = {}  # in the order of the rows
    question = ""
    for _, row, question, better, worse in rows:  # noqa: B007 (the question is the same in all)
        if (better, worse) in pairs:
            tally.skip(row, "duplicate of an earlier row")
        pairs[better, worse] = None
    beaten = {worse for _, worse in pairs}
    texts = dict.fromkeys(text for pair in pairs for text in pair)
    answers = sorted(texts, key=lambda text: text in beaten)  # never beaten: the best one that is known
    place = {text: index for index, text in enumerate(answers)}
    return _thread(thread, question, answers, [(place[j], place[k]) for j, k in pairs], tally, pairing)


def _thread(
    id: str, question: str, answers: list[str], pairs: list[tuple[int, int]], tally: Tally, pairing: Pairing
) -> Thread:
    different = [(better, worse) for better, worse in pairs if answers[better] != answers[worse]]
    better, worse = pairing.draw(different, id)
    tally.questions += 1
    tally.answers += len(answers)
    tally.pairs += len(better)
    return Thread(id, question, answers, better, worse)
