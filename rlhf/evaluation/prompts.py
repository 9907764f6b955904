"""Prompt templates as files: chat messages with placeholders, for annotators and fact checkers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from rlhf import root
from rlhf.data.templates import Template
from rlhf.errors import ConfigError

MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ChatTemplate:
    """(role, text) per message; the texts are Python format strings (literal braces are doubled: `{{`)."""

    messages: tuple[tuple[str, str], ...]

    def render(self, **values: str) -> list[dict[str, str]]:
        """The messages as the OpenAI protocol has them; braces within the values stay as they are."""
        return [{"role": role, "content": text.format(**values)} for role, text in self.messages]


def load_template(name: str, expected: set[str], key: str) -> ChatTemplate:
    """Read a file: messages as `<|im_start|>role`, text, `<|im_end|>` (AlpacaEval's own format), or one user message.

    A name without a suffix is a file of `conf/judge/prompts`, anything else a path.

    Raises:
        ConfigError: there is no such file, or its placeholders are not exactly `expected`.
    """
    own = root() / "conf" / "judge" / "prompts"
    path = Path(name).expanduser() if Path(name).suffix else own / f"{name}.txt"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in own.glob("*.txt")))
        raise ConfigError(f"{key}={name}: there is no such file; allowed: a path, or one of {there}")
    text = path.read_text(encoding="utf-8")
    messages = tuple((role, content.strip()) for role, content in MESSAGE.findall(text)) or (("user", text.strip()),)
    unknown = sorted({role for role, _ in messages} - set(ROLES))
    if unknown:
        raise ConfigError(f"{key}={name}: there is no role {unknown[0]}; allowed: {', '.join(ROLES)}")
    try:
        found = {field for _, content in messages for _, field, _, _ in Formatter().parse(content) if field is not None}
    except ValueError as error:
        raise ConfigError(f"{key}={name} is no Python format string: {error}") from None
    if found != expected:
        wanted, has = (", ".join(f"{{{field}}}" for field in sorted(fields)) for fields in (expected, found))
        raise ConfigError(f"{key}={name} must use exactly {wanted}; it has {has or 'no placeholder'}")
    return ChatTemplate(messages)


def own_files(names: Iterable[str]) -> list[Path]:
    """Those of the templates that are files of the user's, each once."""
    return [Path(name).expanduser() for name in dict.fromkeys(names) if Path(name).suffix]


def bare_instruction(prompt: str, template: Template | None) -> str:
    """The request that a templated prompt states, as judges read it: undoes `Template.render`."""
    for text in (template.with_input, template.without_input) if template else ():
        pattern = "".join(
            re.escape(literal) + (f"(?P<{field}>.*)" if field else "") for literal, field, *_ in Formatter().parse(text)
        )
        found = re.fullmatch(pattern, prompt, re.DOTALL)
        if found:
            return "\n\n".join(found[name] for name in ("instruction", "input") if name in found.groupdict())
    return prompt
