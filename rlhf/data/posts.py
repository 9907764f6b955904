"""Read the posts of a Stack Exchange dump. `Posts.xml` is parsed incrementally, with one row in memory at a time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import ParseError, iterparse

from rlhf.data.compression import READ_ERRORS, open_decompressed
from rlhf.data.fields import text_field
from rlhf.errors import DataError, RowError

QUESTION, ANSWER = "1", "2"  # values of `PostTypeId`


@dataclass(frozen=True, slots=True)
class Post:
    """A question or an answer.

    Attributes:
        id: The post's id.
        question: The id of the question that the post answers; a question's own id.
        votes: Upvotes minus downvotes (`Score` in the dump).
        body: The text as HTML.
        accepted: For a question, the id of the accepted answer, or None.
        title: For a question, its title.
    """

    id: int
    question: int
    votes: int
    body: str
    accepted: int | None = None
    title: str = ""

    @property
    def is_answer(self) -> bool:
        """Whether the post is an answer."""
        return self.id != self.question


def read_posts(path: Path) -> Iterator[tuple[int, Post | RowError | None]]:
    """Yield the number of each row, from 1, and its post.

    The post is a `RowError` if a field is missing or malformed, and None if the row is neither a question nor an answer
    (a tag wiki, for example).

    Raises:
        DataError: the file cannot be read to its end, or is not valid XML.
    """
    for number, attributes in _rows(path):
        try:
            yield number, _to_post(attributes)
        except RowError as bad:
            yield number, bad


def answer_score(votes: int, accepted: bool) -> int:
    """The score of an answer: round(log2(1 + votes)), plus 1 if it was accepted; -1 if its votes are negative.

    The formula is that of Askell et al. 2021 (https://arxiv.org/abs/2112.00861), as used by StackLLaMA.
    """
    return -1 if votes < 0 else round(math.log2(1 + votes)) + accepted


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield the number and the attributes of each `<row>` element."""
    number, root = 0, None
    try:
        with open_decompressed(path) as stream:
            for event, element in iterparse(stream, ("start", "end")):
                if root is None:
                    root = element
                if event == "end" and element.tag == "row":
                    number += 1
                    yield number, element.attrib
                    root.clear()  # otherwise the tree would keep every row
    except (ParseError, LookupError, ValueError) as error:  # the last two are raised for an unknown encoding
        raise DataError(f"{path} is not valid XML beyond row {number:,}: {error}.") from error
    except READ_ERRORS as error:
        raise DataError(f"{path} cannot be read beyond row {number:,}: {error}.") from error


def _to_post(row: Mapping[str, str]) -> Post | None:
    kind = text_field(row, "PostTypeId")
    if kind not in (QUESTION, ANSWER):
        return None
    id, votes, body = _integer_field(row, "Id"), _integer_field(row, "Score"), text_field(row, "Body")
    if kind == ANSWER:
        question = _integer_field(row, "ParentId")
        if question == id:
            raise RowError("answers itself")
        return Post(id, question, votes, body)
    accepted = _integer_field(row, "AcceptedAnswerId") if "AcceptedAnswerId" in row else None
    return Post(id, id, votes, body, accepted, text_field(row, "Title", optional=True))


def _integer_field(row: Mapping[str, str], name: str) -> int:
    try:
        value = int(text_field(row, name))
    except ValueError:
        raise RowError(f"`{name}` is not an integer") from None
    if abs(value) >= 2**63:  # SQLite, where posts are grouped, stores 64-bit integers
        raise RowError(f"`{name}` is out of range")
    return value
