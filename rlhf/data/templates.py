"""The prompt template, which turns an instruction or a conversation into the text that a model reads."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from rlhf.data.chat_template import ChatTemplate, Message
from rlhf.data.special_tokens import unmarked
from rlhf.errors import DataError, RowError


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

    def render_messages(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation, of which these strings can only express a single question.

        Raises:
            RowError: there is more than one message, or it is not the user's.
        """
        if [message["role"] for message in messages] != ["user"]:
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages)) or "no message"
            raise RowError(
                f"this template only has a place for one message of the user, not for a conversation ({roles}); "
                "data/template=chat has"
            )
        return self.render(str(messages[0]["content"]))

    def messages_of(self, prompt: str) -> list[dict[str, str]] | None:
        """The message that `render` made a prompt of, an input as its second paragraph; None for another text."""
        found: list[dict[str, str]] = []
        for text in (self.with_input, self.without_input):
            match = re.fullmatch("(.*)".join(map(re.escape, _literal_texts(text))), prompt, re.DOTALL)
            names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
            found += [dict(zip(names, match.groups(), strict=True))] if match else []
        if not found:
            return None
        # If both strings match, it is the one that has more of the prompt as its own text.
        parts = min(found, key=lambda parts: sum(map(len, parts.values())))
        return [
            {"role": "user", "content": "\n\n".join(parts[name] for name in ("instruction", "input") if name in parts)}
        ]

    @property
    def fixed_texts(self) -> tuple[tuple[str, ...], ...]:
        """For each of the two strings, the literal texts before, between and after its placeholders."""
        return _literal_texts(self.with_input), _literal_texts(self.without_input)


PromptTemplate = Template | ChatTemplate
"""Both have `render`, `render_messages` and its inverse `messages_of`."""


def conversation_of(prompt: str, template: PromptTemplate | None) -> list[dict[str, str]]:
    """The messages that `template` made a prompt of; a text in no template is a message of the user.

    Raises:
        RowError: a chat template made the prompt, but it cannot be read back.
    """
    messages = template.messages_of(prompt) if template else None
    if messages is None and isinstance(template, ChatTemplate) and template.special.search(prompt):
        raise RowError("this prompt of data/template=chat cannot be read back as a conversation")
    return messages or [{"role": "user", "content": unmarked(prompt)}]


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
        raise DataError(f"data.template.{name} is not a Python format string: {error}.") from None
    # Conversions (`!r`) and format specs (`:>10`) would silently change the text, so only bare names are accepted.
    found = {
        f"{{{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
        for _, field, spec, conversion in parts
    }
    wanted = {f"{{{field}}}" for field in expected}
    if found != wanted:
        raise DataError(
            f"data.template.{name} must use exactly {' and '.join(sorted(wanted, reverse=True))}; "
            f"it has {', '.join(sorted(found)) or 'no placeholder'}."
        )
