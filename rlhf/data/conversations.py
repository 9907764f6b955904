"""Read conversations: lists of messages as OpenAI or ShareGPT write them, or one text with names of speakers in it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.data.fields import checked_text, tidied
from rlhf.errors import DataError, RowError

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""
ToolTurns = Literal["refuse", "text"]
AssistantTurns = Literal["last", "all"]

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "function_call": "call",
}  # fmt: skip
"""The names of roles in data sets → what they are here; `call` is an assistant that calls a tool."""


@dataclass(frozen=True)
class Markers:
    """The texts that precede each turn in a conversation written as one text, such as `Human:` and `Assistant:`."""

    user: str
    assistant: str

    @classmethod
    def parse(cls, markers: Any) -> "Markers | None":
        """Parse a mapping with the two texts, or null.

        Raises:
            DataError: any other value.
        """
        if markers is None:
            return None
        texts = markers if isinstance(markers, Mapping) else {}
        valid = set(texts) == {"user", "assistant"} and all(isinstance(text, str) for text in texts.values())
        if not valid or not all(text.strip() for text in texts.values()) or texts["user"] == texts["assistant"]:
            raise DataError(
                f"data.turn_markers={markers!r} is not allowed; allowed: null, or a mapping with two different texts "
                "user and assistant."
            )
        return cls(**texts)

    def begins(self, text: str) -> bool:
        """Whether a text begins with a marker; the first one may lack the blank lines that separate turns."""
        return text.lstrip().startswith((self.user.lstrip(), self.assistant.lstrip()))

    def split(self, text: str, name: str) -> list[Message]:
        """The turns of `text`, as they stand; a last turn of the assistant may be empty.

        Raises:
            RowError: the text does not begin with a marker, or a turn is empty or follows one of the same speaker.
        """
        if not self.begins(text):
            raise RowError(f"`{name}` does not begin with a turn marker")
        separator = self.user[: len(self.user) - len(self.user.lstrip())]
        pattern = f"({re.escape(self.user)}|{re.escape(self.assistant)})"
        _, *parts = re.split(pattern, separator + text.lstrip())  # markers and what was said after them alternate
        roles = {self.user: "user", self.assistant: "assistant"}
        spoken = zip(parts[::2], parts[1::2], strict=True)
        turns = [{"role": roles[mark], "content": tidied(said)} for mark, said in spoken]
        if not all(turn["content"] for turn in turns[:-1]) or turns[-1] == {"role": "user", "content": ""}:
            raise RowError(f"`{name}` has an empty turn")
        check_turns(turns, name)
        return turns


def read_messages(value: Any, name: str, tool_turns: ToolTurns = "refuse") -> list[Message]:
    """The messages of a conversation or of a part of it.

    At most one system message, which is the first; then user and assistant by turns, either one first.

    Args:
        value: A list of objects with `role` and `content`, or with `from` and `value`.
        name: The column, for messages.
        tool_turns: With `text`, calls of tools become text of the assistant (as JSON), and their results become turns
            of the user.

    Raises:
        RowError: anything else, a message without text, or a turn of a tool that is to be refused.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"`{name}` is not a list of messages")
    messages: list[Message] = []
    for item in value:
        role, content = _read_message(item, name, tool_turns)
        before = messages[-1] if messages else None
        if role == "tool" and before and before["role"] == "tool":
            before["content"] += f"\n\n{content}"  # the results of several calls are one turn
        else:
            messages.append({"role": role, "content": content})
    for message in messages:
        message["role"] = "user" if message["role"] == "tool" else message["role"]
    check_turns(messages, name)
    return messages


def check_turns(messages: Sequence[Message], name: str) -> None:
    """Check the order of the roles.

    Raises:
        RowError: a system message that is not the first, or two turns of the same speaker in a row.
    """
    for before, message in zip([None, *messages], messages, strict=False):
        if before and message["role"] == "system":
            raise RowError(f"`{name}` has a system message after the first one")
        if before and message["role"] == before["role"]:
            raise RowError(f"`{name}` has two turns of the {message['role']} in a row")


def _read_message(item: Any, name: str, tool_turns: ToolTurns) -> tuple[str, str]:
    """The role, which may also be `tool`, and the text of a message."""
    if not isinstance(item, Mapping):
        raise RowError(f"`{name}` has a message that is not an object")
    said = item.get("role") or item.get("from")
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        shown = repr(said[:20]) if isinstance(said, str) else f"of type {type(said).__name__}"
        raise RowError(f"`{name}` has a message with the role {shown}")
    calls = item.get("tool_calls") or item.get("function_call")
    if tool_turns == "refuse" and (calls or role in ("tool", "call")):
        raise RowError(f"`{name}` has a turn with a tool (`tool_turns: text` keeps it as text)")
    content = _text_of(item.get("content", item.get("value")), name)
    if calls:
        written = json.dumps(calls, ensure_ascii=False)
        content = f"{content}\n\n{written}" if content and content.strip() else written
    return "assistant" if role == "call" else role, tidied(checked_text(content, f"{name}.content"))


def _text_of(content: Any, name: str) -> Any:
    """The text of a message that consists of parts; other content as it is."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, Mapping)]
    other = next((str(part.get("type")) for part in parts if part.get("type") != "text"), None)
    if other or len(parts) < len(content):
        raise RowError(f"`{name}` has a part of type {(other or 'none')[:20]!r}, not text")
    return "".join(checked_text(part.get("text"), f"{name}.content", optional=True) for part in parts)
