"""Parse and check the options that several data sets share.

The values come from a configuration and may be anything; every function raises `DataError` with one sentence for a
value that is not allowed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from datasets import Dataset

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.reading import OnBadRow
from rlhf.data.records import SPLITS, Split
from rlhf.data.sources import Source
from rlhf.data.templates import PromptTemplate, Template
from rlhf.errors import DataError


class Checkable(Protocol):
    """A source whose presence can be checked without reading it."""

    def check(self) -> None: ...  # noqa: D102


def as_list(specs: Any) -> list[Any]:
    """A list or tuple as a list; any other value as a list of one."""
    return list(specs) if isinstance(specs, list | tuple) else [specs]


def parse_sources(specs: Any, root: Path) -> tuple[Source, ...]:
    """Parse one source or a list of sources; see `Source.parse`.

    Raises:
        DataError: a source is malformed.
    """
    return tuple(Source.parse(spec, root) for spec in as_list(specs))


def check_sources(key: str, sources: Iterable[Checkable], allowed: str) -> None:
    """Check without reading them that there are sources and that their files can be read.

    Args:
        key: The configuration key of the sources, for messages.
        sources: The sources.
        allowed: What `key` may name, for the message if there are none.

    Raises:
        DataError: there is no source, or one is missing, empty or of an unknown format.
    """
    sources = tuple(sources)
    if not sources:
        raise DataError(f"{key} is empty; allowed: {allowed}.")
    for source in sources:
        try:
            source.check()
        except DataError as error:
            raise DataError(f"{key}: {error}") from None


def parse_choice(value: Any, kind: Any, key: str) -> Any:
    """The value of a key that allows some words: those of the `Literal` type `kind`.

    Raises:
        DataError: any other value.
    """
    words = get_args(kind)
    if value not in words:
        allowed = (" or " if len(words) == 2 else ", ").join(words)
        raise DataError(f"data.{key}={value!r} is not allowed; allowed: {allowed}.")
    return value


def parse_on_bad_row(on_bad_row: Any) -> OnBadRow:
    """Parse `skip` or `fail`.

    Raises:
        DataError: any other value.
    """
    return cast(OnBadRow, parse_choice(on_bad_row, OnBadRow, "on_bad_row"))


def parse_template(template: Any) -> PromptTemplate:
    """The template that a mapping describes: the two strings of a `Template`, or the keys of a `ChatTemplate`.

    Raises:
        DataError: any other value, or one of the strings is malformed.
    """
    keys = set(template) if isinstance(template, Mapping) else set()
    known = {field.name: field for field in fields(ChatTemplate)}
    if "name_or_path" in keys and keys <= set(known) and isinstance(template.get("options", {}), Mapping):
        return ChatTemplate(**{**template, "options": dict(template.get("options", {}))})
    if keys != {"with_input", "without_input"} or not all(isinstance(text, str) for text in template.values()):
        raise DataError(
            f"data.template={template!r} is not allowed; allowed: data/template=…, a mapping with the strings "
            f"with_input and without_input, or with the keys of conf/data/template/chat.yaml ({', '.join(known)})."
        )
    return Template(**template)


def parse_positive(number: Any, name: str) -> int:
    """A positive integer.

    Raises:
        DataError: any other value of the key `name`.
    """
    if type(number) is not int or number < 1:
        raise DataError(f"{name}={number!r} is not allowed; allowed: a positive integer.")
    return number


def parse_max_rows(max_rows: Any) -> Mapping[Split, int]:
    """Parse the largest number of rows: one number for all splits, a mapping from split to number, or null.

    Returns:
        A mapping from split to number; a split that is not in it has no limit.

    Raises:
        DataError: an unknown split, or a number that is not a positive integer.
    """
    limits = max_rows if isinstance(max_rows, Mapping) else {} if max_rows is None else dict.fromkeys(SPLITS, max_rows)
    if not set(limits) <= set(SPLITS) or not all(type(limit) is int and limit > 0 for limit in limits.values()):
        raise DataError(
            f"data.max_rows={max_rows!r} is not allowed; allowed: a positive integer, or a mapping to positive "
            f"integers from some of {', '.join(SPLITS)}."
        )
    return limits


def first_rows(rows: Dataset, split: Split, limits: Mapping[Split, int]) -> Dataset:
    """The first rows, at most as many as the limit of `split`."""
    return rows.take(min(limits.get(split, len(rows)), len(rows)))
