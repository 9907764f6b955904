"""The columns of the data set that a function of the user's own asks for by the names of its parameters."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.data.records import DataSource, Split
from rlhf.errors import ConfigError, DataError

SPLITS: tuple[Split, ...] = ("prompts", "eval")  # whose prompts are answered
GIVEN = 2  # a function's first parameters: prompts and responses


def asked_columns(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """The parameters behind prompts and responses, and whether each is required; and whether it takes all columns."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions written in C have none
        parameters = []
    named = [p for p in parameters[GIVEN:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default is p.empty for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_columns(key: str, function: Callable[..., Any], source: DataSource) -> None:
    """Check that the data set has the columns that a function requires.

    Raises:
        ConfigError: it lacks one.
    """
    required = [name for name, needed in asked_columns(function)[0].items() if needed]
    found = _columns(source) if required else []
    absent = [name for name in required if name not in found]
    if absent:
        raise ConfigError(
            f"{key} asks for {', '.join(absent)}, which no row of the data set's prompts has; allowed: "
            f"{', '.join(found)}"
        )


class Columns:
    """The values of some columns, by prompt.

    Rows of the splits `prompts` and `eval` count alike; "" and null are no values. Two rows with one prompt must not
    have different values, as an answer could then not be compared with either.

    Raises:
        DataError: they have.
    """

    def __init__(self, function: Callable[..., Any], source: DataSource):
        named, takes_all = asked_columns(function)
        wanted = [name for name in (_columns(source) if named or takes_all else []) if takes_all or name in named]
        self.values: dict[str, dict[str, Any]] = {name: {} for name in wanted}
        for split in SPLITS if wanted else ():
            if split not in source.splits:
                continue
            rows = source.load(split)
            for name in set(wanted) & set(rows.column_names):
                self._add(name, rows["prompt"], rows[name])

    def _add(self, name: str, prompts: Sequence[str], values: Sequence[Any]) -> None:
        known = self.values[name]
        for prompt, value in zip(prompts, values, strict=True):
            if value is None or value == "":
                continue
            if known.setdefault(prompt, value) != value:
                raise DataError(
                    f"the prompt {prompt[:60]!r} has two values of {name}, {str(known[prompt])[:40]!r} and "
                    f"{str(value)[:40]!r}, so that scorer.function cannot be given one"
                )

    def __call__(self, prompts: Sequence[str]) -> Mapping[str, list[Any]]:
        """The columns of these prompts; None for a prompt without a value."""
        return {name: [known.get(prompt) for prompt in prompts] for name, known in self.values.items()}


def _columns(source: DataSource) -> list[str]:
    """All columns of the prompts but the prompt itself, in their order."""
    splits = [split for split in SPLITS if split in source.splits]
    return list(dict.fromkeys(name for split in splits for name in source.load(split).column_names if name != "prompt"))
