"""Read a text field of a row."""

from collections.abc import Mapping
from typing import Any

from rlhf.errors import RowError

MAX_TEXT = 1_000_000
"""Longest text of a field in characters. A longer one means a broken file and could exhaust a tokenizer's memory."""


def text_field(row: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    """The text in the field `name` of a row, checked and `tidied`.

    If the field is `optional`, a missing, null or blank one gives "".

    Raises:
        RowError: the field is missing, or see `checked_text`.
    """
    return tidied(checked_text(row.get(name), name, optional=optional))


def checked_text(value: Any, name: str, *, optional: bool = False) -> str:
    """The value of a field called `name`, as it is; "" if the field is `optional` and missing, null or blank.

    Raises:
        RowError: the value is missing, blank, not a string, longer than `MAX_TEXT`, or cannot be encoded as UTF-8.
    """
    if value is None and optional:
        return ""
    if value is None:
        raise RowError(f"no `{name}`")
    if not isinstance(value, str):
        raise RowError(f"`{name}` is of type {type(value).__name__}, not text")
    if len(value) > MAX_TEXT:
        raise RowError(f"`{name}` is longer than {MAX_TEXT:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"`{name}` contains half a character (a lone surrogate)") from None
    if not value.strip() and not optional:
        raise RowError(f"empty `{name}`")
    return value


def tidied(value: str) -> str:
    """A text without surrounding white space, which is up to the template, and without common indentation.

    The indentation is removed from all lines at once, because code that lost only the indentation of its first line
    would be broken. A single space before the first line is removed separately: it is the separator between a prompt
    and its response, not indentation.
    """
    # 1. Drop blank lines at both ends.
    start = value.rfind("\n", 0, len(value) - len(value.lstrip())) + 1
    lines = value[start:].rstrip().split("\n")
    # 2. Find the longest white space that every line starts with; spaces and tabs are different characters.
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if line.strip()]
    margin = next((i for i, column in enumerate(zip(*indents, strict=False)) if len(set(column)) > 1), None)
    margin = min(map(len, indents), default=0) if margin is None else margin
    first, *rest = [line[margin:] if line.strip() else line for line in lines]
    # 3. Drop a single space left before the first line.
    if first[:1].isspace() and first[0] != "\t" and first[1:2].strip():
        first = first[1:]
    return "\n".join([first, *rest])
