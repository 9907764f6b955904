"""Read threads from a Stack Exchange dump or from rows of pairs.

In a dump an answer may be far from its question, and the posts need not fit in memory, so they are grouped by question
on disk. One question with all its answers is in memory at a time.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf.data.compression import check_decompressor
from rlhf.data.fields import text_field
from rlhf.data.grouping import grouped_on_disk
from rlhf.data.markdown import to_markdown
from rlhf.data.posts import answer_score, read_posts
from rlhf.data.sources import Source
from rlhf.data.threads import Pairing, Tally, Thread, make_thread
from rlhf.errors import DataError, RowError
from rlhf.files.digests import file_stamp


@dataclass(frozen=True)
class Dump:
    """The file `Posts.xml` of a Stack Exchange dump, possibly compressed. `name` is the source as configured."""

    name: str
    path: Path

    def check(self) -> None:
        """Check without reading it that the file can be read.

        Raises:
            DataError: it is missing, a directory or empty, or the package to decompress it is missing.
        """
        if not os.path.isfile(self.path):
            raise DataError(f"{self.path} does not exist: name a site's Posts.xml, Posts.xml.gz or Posts.xml.zst.")
        if not self.path.stat().st_size:
            raise DataError(f"{self.path} is empty.")
        check_decompressor(self.path)

    def fingerprint(self) -> str:
        """A string that changes when the file changes."""
        return _file_fingerprint(self.path)

    def threads(self, tally: Tally, pairing: Pairing, folder: Path) -> Iterator[Thread]:
        """Yield the threads in the order of their ids, counting rows in `tally`; `folder` is for temporary files."""
        columns = "thread INT, answer INT, row INT, id INT, votes INT, accepted INT, title, body"
        # Sorting by `answer` (0 or 1) puts the question before its answers.
        for id, posts in grouped_on_disk(self._posts(tally), columns, "thread, answer, row", folder):
            thread = _thread_of_posts(str(id), posts, tally, pairing)
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
    """Rows of pairs in the format of the Hub data set `lvwerra/stack-exchange-paired`.

    The fields are `question`, `response_j` (the better answer), `response_k` and optionally `qid`, the question's id.
    """

    source: Source

    @property
    def name(self) -> str:
        """The source as configured."""
        return self.source.name

    def check(self) -> None:
        """Check without reading it that a local file can be read.

        Raises:
            DataError: it is missing, empty or of an unknown format.
        """
        self.source.check()

    def fingerprint(self) -> str:
        """A string that changes when the rows change."""
        return self.source.fingerprint() if self.source.path is None else _file_fingerprint(self.source.path)

    def threads(self, tally: Tally, pairing: Pairing, folder: Path) -> Iterator[Thread]:
        """Yield the threads in the order of their ids, counting rows in `tally`; `folder` is for temporary files."""
        columns = "thread TEXT, row INT, question, better, worse"
        for id, rows in grouped_on_disk(self._rows(tally), columns, "thread, row", folder):
            yield _thread_of_pairs(id, rows, tally, pairing)

    def _rows(self, tally: Tally) -> Iterator[tuple[Any, ...]]:
        for number, row in self.source.rows():
            tally.rows += 1
            try:
                yield _to_pair(number, row)
            except RowError as bad:
                tally.skip(number, bad)


def _file_fingerprint(path: Path) -> str:
    """The file's name, size, times and inode.

    A digest of the content would need a second pass over a file that may have many gigabytes.
    """
    return f"{path.name} {' '.join(map(str, file_stamp(path)))}"


def _thread_of_posts(id: str, posts: Iterable[tuple[Any, ...]], tally: Tally, pairing: Pairing) -> Thread | None:
    """The thread of one question and its answers, None if the question is missing or bad.

    `posts` are rows of the table in `Dump.threads`, the question first.
    """
    question: str | None = None
    accepted_id, seen = None, set()
    answers: list[tuple[int, int, int, str]] = []
    # 1. Convert the posts. A bad one is counted and the others are kept.
    for _, is_answer, row, post_id, votes, accepted, title, body in posts:
        try:
            if post_id in seen:
                raise RowError("duplicate `Id`")
            seen.add(post_id)
            markdown = _body_as_markdown(body)
            if not is_answer:
                question = f"{title}\n\n{markdown}" if pairing.title and title else markdown
                accepted_id = accepted
            elif question is None:
                raise RowError("its question is missing or cannot be used")
            else:
                answers.append((-answer_score(votes, post_id == accepted_id), -votes, row, markdown))
        except RowError as bad:
            tally.skip(row, bad)
    if question is None:
        return None
    # 2. Sort by score, then by votes, then by position in the file.
    answers.sort()
    # 3. Pair answers with different scores; entry 0 is the negative score, so the lower one is the better.
    pairs = [(i, j) for i, j in combinations(range(len(answers)), 2) if answers[i][0] < answers[j][0]]
    return make_thread(id, question, [answer[-1] for answer in answers], pairs, tally, pairing)


def _body_as_markdown(html: str) -> str:
    markdown = to_markdown(html)
    if not markdown:
        raise RowError("empty `Body`")
    return markdown


def _to_pair(number: int, row: Any) -> tuple[str, int, str, str, str]:
    """The thread's id, row number, question, better answer and worse answer of a row of pairs."""
    if isinstance(row, RowError):
        raise row
    question, better, worse = (text_field(row, name) for name in ("question", "response_j", "response_k"))
    if better == worse:
        raise RowError("`response_j` and `response_k` are identical")
    qid = row.get("qid")
    thread = hashlib.sha256(question.encode()).hexdigest()[:16] if qid is None else str(qid)
    return thread, number, question, better, worse


def _thread_of_pairs(id: str, rows: Iterable[tuple[Any, ...]], tally: Tally, pairing: Pairing) -> Thread:
    """The thread of all pairs of one question; `rows` are rows of the table in `Pairs.threads`."""
    pairs: dict[tuple[str, str], None] = {}  # an ordered set, in the order of the rows
    question = ""
    for _, row, question, better, worse in rows:  # noqa: B007 (all rows have the same question)
        if (better, worse) in pairs:
            tally.skip(row, "duplicate of an earlier row")
        pairs[better, worse] = None
    # There are no scores, so the best answer is one that no other is preferred to.
    beaten = {worse for _, worse in pairs}
    texts = dict.fromkeys(text for pair in pairs for text in pair)
    answers = sorted(texts, key=lambda text: text in beaten)
    index_of = {text: index for index, text in enumerate(answers)}
    return make_thread(id, question, answers, [(index_of[j], index_of[k]) for j, k in pairs], tally, pairing)
