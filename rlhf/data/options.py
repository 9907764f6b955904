"""What the configurations of several data sets have in common: options understood and checked in one way."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast, get_args, runtime_checkable

from datasets import Dataset

from rlhf.data.reading import OnBadRow
from rlhf.data.records import SPLITS, Split
from rlhf.data.sources import Source
from rlhf.data.templates import Template
from rlhf.errors import DataError


@runtime_checkable
class Checkable(Protocol):
    """Anything that can say whether it is there."""

    def check(self) -> None: ...  # noqa: D102


def parse_sources(specs: Any, root: Path) -> tuple[Source, ...]:
    """One source or a list of them."""
    return tuple(Source.parse(spec, root) for spec in as_list(specs))


def as_list(specs: Any) -> list[Any]:
    """One or several, as several."""
    return list(specs) if isinstance(specs, list | tuple) else [specs]


def check_sources(key: str, sources: Iterable[Checkable]) -> None:
    """See in an instant whether the files are there.

    Raises:
        DataError: one is missing, empty or of an unknown format; it names `key`.
    """
    for source in sources:
        try:
            source.check()
        except DataError as error:
            raise DataError(f"{key}: {error}") from None


def parse_on_bad_row(on_bad_row: str) -> OnBadRow:
    """`skip` or `fail`.

    Raises:
        DataError: anything else.
    """
    if on_bad_row not in get_args(OnBadRow):
        raise DataError(f"on_bad_row is `skip` or `fail`, not {on_bad_row!r}.")
    return cast(OnBadRow, on_bad_row)


def parse_template(template: Any) -> Template:
    """A prompt template.

    Raises:
        DataError: it is not a mapping with exactly the two texts, or one of them is malformed.
    """
    texts = template if isinstance(template, Mapping) else {}
    if set(texts) != {"with_input", "without_input"} or not all(isinstance(text, str) for text in texts.values()):
        raise DataError(f"template is a mapping with the texts `with_input` and `without_input`, not {template!r}.")
    return Template(**texts)


def parse_max_rows(max_rows: Any) -> Mapping[Split, int]:
    """A positive number for every split, or a mapping from split to number; null is no limit.

    Raises:
        DataError: anything else.
    """
    limits = max_rows if isinstance(max_rows, Mapping) else {} if max_rows is None else dict.fromkeys(SPLITS, max_rows)
    if not set(limits) <= set(SPLITS) or not all(type(limit) is int and limit > 0 for limit in limits.values()):
        raise DataError(f"max_rows is a positive number, or one for some of {', '.join(SPLITS)}, not {max_rows!r}.")
    return limits


def first_rows(rows: Dataset, split: Split, limits: Mapping[Split, int]) -> Dataset:
    """As many rows as the split's limit allows."""
    return rows.take(min(limits.get(split, len(rows)), len(rows)))
