"""The prompt template, which turns an instruction and its optional input into the text that a model reads."""

from dataclasses import dataclass
from string import Formatter

from rlhf.errors import DataError


@dataclass(frozen=True)
class Template:
    """Two Python format strings, in which literal braces are doubled (`{{`).

    Attributes:
        with_input: For rows with an input; uses `{instruction}` and `{input}`.
        without_input: For rows without one; uses `{instruction}`.

    Raises:
        DataError: a string is malformed, or its placeholders are not exactly these.
    """

    with_input: str
    without_input: str

    def __post_init__(self) -> None:
        _check_placeholders("with_input", self.with_input, {"instruction", "input"})
        _check_placeholders("without_input", self.without_input, {"instruction"})

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt for an instruction and an input; "" means that there is no input."""
        if input:
            return self.with_input.format(instruction=instruction, input=input)
        return self.without_input.format(instruction=instruction)

    @property
    def fixed_texts(self) -> tuple[tuple[str, ...], ...]:
        """For each of the two strings, the literal texts before, between and after its placeholders."""
        return _literal_texts(self.with_input), _literal_texts(self.without_input)


def _literal_texts(template: str) -> tuple[str, ...]:
    texts = [""]
    for literal, field, _, _ in Formatter().parse(template):
        texts[-1] += literal
        if field is not None:
            texts.append("")
    return tuple(texts)


def _check_placeholders(name: str, template: str, expected: set[str]) -> None:
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise DataError(f"template.{name} is not a Python format string: {error}.") from None
    # Conversions (`!r`) and format specs (`:>10`) would silently change the text, so only bare names are accepted.
    found = {
        f"{{{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
        for _, field, spec, conversion in parts
    }
    wanted = {f"{{{field}}}" for field in expected}
    if found != wanted:
        raise DataError(
            f"template.{name} must use exactly {' and '.join(sorted(wanted, reverse=True))}; "
            f"it has {', '.join(sorted(found)) or 'no placeholder'}."
        )
