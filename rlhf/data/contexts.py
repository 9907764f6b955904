"""What comes before an answer, and where it ends in texts that repeat it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rlhf.data.conversations import Markers, Message
from rlhf.data.templates import PromptTemplate
from rlhf.errors import RowError


@dataclass(frozen=True)
class Context:
    """What comes before an answer.

    Attributes:
        messages: A conversation, the last turn of which is the user's.
        input: The input that belongs to an instruction, the only message; "" if there is none.
        verbatim: Whether the only message is the prompt as it is, without a template.
    """

    messages: list[Message]
    input: str = ""
    verbatim: bool = False

    def render(self, template: PromptTemplate) -> str:
        """The prompt."""
        if self.verbatim:
            return self.messages[0]["content"]
        if len(self.messages) == 1:
            return template.render(self.messages[0]["content"], self.input)
        return template.render_messages(self.messages)

    @property
    def instruction(self) -> str:
        """The request without the template, as shown to judges."""
        if len(self.messages) == 1:
            content = self.messages[0]["content"]
            return f"{content}\n\n{self.input}" if self.input else content
        return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in self.messages)


def listed(columns: Sequence[tuple[str, Any]]) -> str:
    """The names of columns, for messages; their values do not matter."""
    return " and ".join(dict.fromkeys(f"`{name}`" for name, _ in columns))


def before_last_turn(texts: list[str], markers: Markers, names: str) -> tuple[Context, list[str]]:
    """Divide conversations that are texts after the marker of the assistant's last turn: the prompt, and the answers.

    Raises:
        RowError: they differ before it, or the user speaks after it; `names` are those of the columns.
    """
    parts = [text.rpartition(markers.assistant) for text in texts]
    prompts = {before + marker for before, marker, _ in parts}
    if not all(marker for _, marker, _ in parts):
        raise RowError(f"{names} have no turn marker of the assistant")
    if len(prompts) > 1:
        raise RowError(f"{names} differ before their last turn")
    if not all(answer.strip() and markers.user not in answer for _, _, answer in parts):
        raise RowError(f"{names} do not end with a turn of the assistant")
    return Context([{"role": "user", "content": prompts.pop()}], verbatim=True), [answer for *_, answer in parts]


def common_beginning(texts: list[str], names: str) -> tuple[Context, list[str]]:
    """Divide texts that repeat their prompt before the first word that differs: the prompt, and the answers.

    Raises:
        RowError: they are identical or begin differently; `names` are those of the columns.
    """
    alike = takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))
    common = texts[0][: sum(1 for _ in alike)]
    if len(common) == max(map(len, texts)):
        raise RowError(f"{names} are identical")
    # 1. If one text is the beginning of another one, its last word is its answer.
    kept = common.rstrip() if len(common) == min(map(len, texts)) else common
    # 2. Back to the beginning of the first word that differs, and a space belongs to the word after it.
    end = len(re.sub(r" ?\S*\Z", "", kept))
    prompt = common[:end]
    if not prompt.strip():
        raise RowError(f"{names} have no beginning in common")
    return Context([{"role": "user", "content": prompt}], verbatim=True), [text[end:] for text in texts]
