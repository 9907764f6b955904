"""Which columns of a data set hold which fields: mapped in the configuration, or recognised by their names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from rlhf.data.fields import checked_text, tidied
from rlhf.data.records import Split
from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError

Names = dict[str, str | tuple[str, ...] | None]
"""Field → its column, a path such as `completions.response`, several columns, or None if it is not to be used."""

FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "instruction", "question"),
    "input": ("input",),
    "completion": ("completion", "output", "response", "answer"),
    "label": ("label",),
    "messages": ("messages", "conversations", "conversation"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "score_chosen": ("score_chosen",),
    "score_rejected": ("score_rejected",),
    "output_1": ("output_1",),
    "output_2": ("output_2",),
    "preference": ("preference",),
    "score_1": ("score_1",),
    "score_2": ("score_2",),
    "answers": ("answers",),
    "scores": ("scores",),
    "ranks": ("ranks",),
    "reference": ("reference", "reference_output", "completion", "output", "response", "answer"),
    "text": ("text",),
}
"""The fields, and the names of columns by which they are recognised, the first one first."""

# Format → the fields it needs and those it may have.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "completion": (("prompt", "completion"), ("input", "label")),
    "preference": (("chosen", "rejected"), ("prompt", "input", "score_chosen", "score_rejected")),
    "choice": (("prompt", "output_1", "output_2", "preference"), ("input",)),
    "two scores": (("prompt", "output_1", "output_2", "score_1", "score_2"), ("input",)),
    "scores": (("prompt", "answers", "scores"), ("input",)),
    "ranks": (("prompt", "answers", "ranks"), ("input",)),
    "prompt": (("prompt",), ("input", "reference")),
    "text": (("text",), ()),
}
_PAIRS = ("preference", "choice", "two scores", "scores", "ranks")
_PROMPTS = ("messages", "preference", "prompt")
ALLOWED: dict[Split, tuple[str, ...]] = {
    "sft": ("messages", "completion", *_PAIRS, "text"),
    "sft_validation": ("messages", "completion", *_PAIRS, "text"),
    "preference": _PAIRS,
    "preference_validation": _PAIRS,
    "prompts": _PROMPTS,
    "eval": _PROMPTS,
}
"""The formats that give records of a split; the first one that the columns allow is taken."""
PEEK = 100
"""Rows whose columns are looked at to recognise the format, because a JSON object may leave out empty ones."""


@dataclass(frozen=True)
class Row:
    """A row of a known format, whose values are found by field."""

    values: Mapping[str, Any]
    names: Names
    format: str

    def has(self, field: str) -> bool:
        """Whether the field has a value that is not null."""
        return field in self.names and self.get(field) is not None

    def get(self, field: str) -> Any:
        """The value of a field, or None; a list if it comes from several columns or from a list of objects."""
        name = self.names.get(field)
        if isinstance(name, tuple):
            return [_value(self.values, column) for column in name]
        return None if name is None else _value(self.values, name)

    def column(self, field: str) -> str:
        """The name of a field's column, for messages."""
        name = self.names.get(field)
        return ", ".join(name) if isinstance(name, tuple) else name or field

    def text(self, field: str, *, optional: bool = False, verbatim: bool = False) -> str:
        """The text of a field, tidied unless it is wanted `verbatim`.

        Raises:
            RowError: see `rlhf.data.fields.checked_text`.
        """
        text = checked_text(self.get(field), self.column(field), optional=optional)
        return text if verbatim else tidied(text)


@dataclass(frozen=True)
class MappedSource:
    """A source whose rows are instances of `Row`.

    Attributes:
        source: Where the rows come from.
        columns: The columns that the configuration gives for fields; others are recognised.
        formats: The formats that may be recognised, the first one first.
    """

    source: Source
    columns: Names
    formats: tuple[str, ...]

    @property
    def name(self) -> str:
        """The source as configured."""
        return self.source.name

    def check(self) -> None:
        """Check a local file, and that the format of its first rows is recognised. A Hub id is not looked up.

        Raises:
            DataError: the file cannot be read, a column is missing, or the format is unknown.
        """
        self.source.check()
        if self.source.path is not None:
            next(self.rows())

    def fingerprint(self) -> str:
        """A string that changes when the rows change."""
        return self.source.fingerprint()

    def rows(self) -> Iterator[tuple[int, Row | RowError]]:
        """Yield the number of each row, and the row or why it cannot be read.

        Raises:
            DataError: the source cannot be read, a column is missing, or the format is unknown.
        """
        rows = self.source.rows()
        first = list(islice(rows, PEEK))
        found = list(dict.fromkeys(chain.from_iterable(row for _, row in first if isinstance(row, Mapping))))
        if not found:  # not one row is readable: each is counted with its own reason
            yield from first
            return
        format, names = self._recognise(found)
        for number, row in chain(first, rows):
            yield number, row if isinstance(row, RowError) else Row(row, names, format)

    def _recognise(self, found: list[str]) -> tuple[str, Names]:
        """The format of rows with these columns, and the columns of its fields."""
        names = self._names(found)
        mapped = {field for field, name in self.columns.items() if name is not None}
        fitting = [format for format in self.formats if set(FORMATS[format][0]) <= names.keys()]
        if not fitting:
            known = "; ".join(" + ".join(FORMATS[format][0]) for format in self.formats)
            raise DataError(
                f"{self.name} has the columns {', '.join(found)}, which make none of the known formats; allowed: "
                f"{known} (data.columns={{FIELD: COLUMN, …}} says which column is which field)."
            )
        # The format that uses most of the mapped fields: they say what the rows are meant for.
        format = max(fitting, key=lambda format: len(mapped.intersection(chain(*FORMATS[format]))))
        needed, optional = FORMATS[format]
        return format, {field: names[field] for field in (*needed, *optional) if field in names}

    def _names(self, found: list[str]) -> Names:
        """The columns of all fields that rows with these columns have."""
        taken = set()
        for field, name in self.columns.items():
            for column in name if isinstance(name, tuple) else filter(None, [name]):
                if column not in found and column.partition(".")[0] not in found:
                    raise DataError(
                        f"data.columns.{field}={column}: {self.name} has no such column; allowed: {', '.join(found)}."
                    )
                taken.add(column)
        names: Names = {field: name for field, name in self.columns.items() if name is not None}
        for field, aliases in FIELDS.items():
            free = [alias for alias in aliases if alias in found and alias not in taken]
            if field not in self.columns and free:
                names[field] = free[0]
        return names


def parse_columns(columns: Any) -> Names:
    """Parse a mapping from field to column; null is the same as none.

    Raises:
        DataError: any other value, or an unknown field.
    """
    given = {} if columns is None else columns
    parsed: Names = {}
    for field, name in given.items() if isinstance(given, Mapping) else [(None, None)]:
        several = isinstance(name, list | tuple) and bool(name) and all(isinstance(column, str) for column in name)
        if field not in FIELDS or not (several or name is None or (isinstance(name, str) and name)):
            raise DataError(
                f"data.columns={columns!r} is not allowed; allowed: a mapping to the names of columns (or lists of "
                f"them, or null) from some of {', '.join(FIELDS)}."
            )
        parsed[field] = tuple(name) if isinstance(name, list | tuple) else name
    return parsed


def _value(values: Any, path: str) -> Any:
    """The value at a path; a path through a list gives the list of the values in its objects."""
    if isinstance(values, list):
        return [_value(value, path) for value in values]
    if not isinstance(values, Mapping):
        return None
    if path in values:
        return values[path]
    head, dot, rest = path.partition(".")
    return _value(values.get(head), rest) if dot else None
