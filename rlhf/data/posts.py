"""The posts of a Stack Exchange dump, streamed: whatever the size of `Posts.xml`, one row of it is in memory."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import ParseError, iterparse

from rlhf.data.packing import BROKEN, open_file
from rlhf.data.reading import text
from rlhf.errors import DataError, RowError

QUESTION, ANSWER = "1", "2"


@dataclass(frozen=True, slots=True)
class Post:
    """A question (`question` is then its own id), or an answer to `question`; `body` is HTML."""

    id: int
    question: int
    votes: int
    body: str
    accepted: int | None = None
    title: str = ""

    @property
    def is_answer(self) -> bool:
        """Whether it answers another post."""
        return self.id != self.question


def read_posts(path: Path) -> Iterator[tuple[int, Post | RowError | None]]:
    """Each row's number and its post; None for a row that is neither question nor answer, such as a tag's wiki.

    Raises:
        DataError: the file cannot be read, or is not XML, to its end.
    """
    for number, attributes in _rows(path):
        try:
            yield number, _post(attributes)
        except RowError as bad:
            yield number, bad


def score(votes: int, accepted: bool) -> int:
    """Askell et al. 2021, StackLLaMA: round(log2(1 + upvotes)), plus 1 if accepted; -1 when voted below zero."""
    return -1 if votes < 0 else round(math.log2(1 + votes)) + accepted


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    number, root = 0, None
    try:
        with open_file(path) as stream:
            for event, element in iterparse(stream, ("start", "end")):
                if root is None:
                    root = element
                if event == "end" and element.tag == "row":
                    number += 1
                    yield number, element.attrib
                    root.clear()  # or the rows read would pile up below it
    except (ParseError, LookupError, ValueError) as error:  # the latter for an encoding that there is not
        raise DataError(f"{path} is not valid XML beyond row {number:,}: {error}.") from error
    except BROKEN as error:
        raise DataError(f"{path} cannot be read beyond row {number:,}: {error}.") from error


def _post(row: Mapping[str, str]) -> Post | None:
    kind = text(row, "PostTypeId")
    if kind not in (QUESTION, ANSWER):
        return None
    identity, votes, body = _integer(row, "Id"), _integer(row, "Score"), text(row, "Body")
    if kind == ANSWER:
        question = _integer(row, "ParentId")
        if question == identity:
            raise RowError("answers itself")
        return Post(identity, question, votes, body)
    accepted = _integer(row, "AcceptedAnswerId") if "AcceptedAnswerId" in row else None
    return Post(identity, identity, votes, body, accepted, text(row, "Title", optional=True))


def _integer(row: Mapping[str, str], name: str) -> int:
    try:
        value = int(text(row, name))
    except ValueError:
        raise RowError(f"`{name}` is no whole number") from None
    if abs(value) >= 2**63:
        raise RowError(f"`{name}` is out of range")
    return value
