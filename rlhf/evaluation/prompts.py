"""Prompt templates in files, for annotators and fact checkers, and the instruction that a judge reads."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from rlhf import root
from rlhf.data.records import Prompt
from rlhf.data.special_tokens import unmarked
from rlhf.data.templates import PromptTemplate
from rlhf.errors import ConfigError

MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTemplate:
    """Chat messages with placeholders.

    Each message is a pair (role, text). The texts are Python format strings, in which `{{` is a literal brace.
    """

    messages: tuple[tuple[str, str], ...]

    def render(self, **values: str) -> list[dict[str, str]]:
        """Fill in the placeholders and return the messages in OpenAI's format. Braces in the values are left alone."""
        return [{"role": role, "content": text.format(**values)} for role, text in self.messages]


def load_template(name: str, expected: set[str], key: str) -> ChatTemplate:
    """Read a template file.

    The file holds messages in AlpacaEval's format (`<|im_start|>role`, text, `<|im_end|>`), or else the plain text of a
    single user message.

    Args:
        name: A path, or the name without a suffix of a file in `conf/judge/prompts`.
        expected: The placeholders that the template must use.
        key: The configuration key of the name, for error messages.

    Raises:
        ConfigError: There is no such file, it is malformed, or its placeholders are not exactly `expected`.
    """
    bundled = root() / "conf" / "judge" / "prompts"
    path = Path(name).expanduser() if Path(name).suffix else bundled / f"{name}.txt"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in bundled.glob("*.txt")))
        raise ConfigError(f"{key}={name}: there is no such file; allowed: a path, or one of {names}")
    text = path.read_text(encoding="utf-8")
    messages = tuple((role, content.strip()) for role, content in MESSAGE.findall(text)) or (("user", text.strip()),)
    unknown = sorted({role for role, _ in messages} - set(ROLES))
    if unknown:
        raise ConfigError(f"{key}={name}: there is no role {unknown[0]}; allowed: {', '.join(ROLES)}")
    try:
        found = {field for _, content in messages for _, field, _, _ in Formatter().parse(content) if field is not None}
    except ValueError as error:
        raise ConfigError(f"{key}={name} is not a Python format string: {error}") from None
    if found != expected:
        wanted, has = (", ".join(f"{{{field}}}" for field in sorted(fields)) for fields in (expected, found))
        raise ConfigError(f"{key}={name} must use exactly {wanted}; it has {has or 'no placeholder'}")
    return ChatTemplate(messages)


def user_files(names: Iterable[str]) -> list[Path]:
    """Return the templates that are the user's own files (named by a path), each once."""
    return [Path(name).expanduser() for name in dict.fromkeys(names) if Path(name).suffix]


def instruction_or_prompt(row: Prompt) -> str:
    """Return the bare instruction of a prompt, or the prompt's text if it has no separate instruction."""
    return row.instruction or unmarked(row.prompt)


def strip_template(prompt: str, template: PromptTemplate | None) -> str:
    """Return the instruction that the template turned into `prompt`, followed by its input if there is one.

    Of a conversation, it is the last message. A prompt that does not match the template is returned unchanged.
    """
    messages = template.messages_of(prompt) if template else None
    return messages[-1]["content"] if messages else unmarked(prompt)
