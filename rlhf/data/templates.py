"""The prompt template: how an instruction, and its input if it has one, become the text that a model reads."""

from dataclasses import dataclass
from string import Formatter

from rlhf.errors import DataError


@dataclass(frozen=True)
class Template:
    """A pair of Python format strings, with `{instruction}` and `{input}` (literal braces are doubled: `{{`).

    Raises:
        DataError: a string is malformed, lacks a placeholder or has one too many.
    """

    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        _require("with_input", self.with_input, {"instruction", "input"})
        _require("without_input", self.without_input, {"instruction"})

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt."""
        if input:
            return self.with_input.format(instruction=instruction, input=input)
        return self.without_input.format(instruction=instruction)

    @property
    def fixed_texts(self) -> tuple[tuple[str, ...], ...]:
        """Of each string what stands before, between and behind its placeholders."""
        return _around_placeholders(self.with_input), _around_placeholders(self.without_input)


def _around_placeholders(template: str) -> tuple[str, ...]:
    texts = [""]
    for literal, field, _, _ in Formatter().parse(template):
        texts[-1] += literal
        if field is not None:
            texts.append("")
    return tuple(texts)


def _require(name: str, template: str, expected: set[str]) -> None:
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"template.{name} is no Python format string: {error}.") from None
    # Conversions (`!r`) and format specs (`:>10`) would silently change the text: a placeholder is a bare name.
    found = {
        f"{{{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
        for _, field, spec, conversion in parts
    }
    wanted = {f"{{{field}}}" for field in expected}
    if found != wanted:
        raise DataError(
            f"template.{name} must use exactly {' and '.join(sorted(wanted, reverse=True))}, "
            f"it has {', '.join(sorted(found)) or 'no placeholder'}."
        )
