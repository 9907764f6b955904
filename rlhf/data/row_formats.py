"""From a row of a known format to a prompt with its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.choices import Choosing, Pair, number_of
from rlhf.data.column_maps import Row
from rlhf.data.contexts import Context, before_last_turn, common_beginning, listed
from rlhf.data.conversations import Markers, Message, ToolTurns, read_messages
from rlhf.data.fields import checked_text, tidied
from rlhf.errors import RowError

ANSWERS = ("chosen", "rejected", "output_1", "output_2", "answers")
"""The fields of answers that are compared."""


@dataclass(frozen=True)
class Reader:
    """Reads rows.

    Attributes:
        choosing: How pairs are made from annotations.
        tool_turns: Whether turns with tools are refused or kept as text.
        markers: What precedes the turns of a conversation that is one text; None if no text is one.
        verbatim: Whether prompts and answers that are texts are used as they are, without a template.
    """

    choosing: Choosing
    tool_turns: ToolTurns = "refuse"
    markers: Markers | None = None
    verbatim: bool = False

    def conversation(self, row: Row) -> list[Message]:
        """The conversation of a row of the format `messages`.

        Raises:
            RowError: it is malformed or does not begin with the user, apart from a system message.
        """
        return self._whole(self._messages(row.get("messages"), row.column("messages")), row.column("messages"))

    def prompt(self, row: Row) -> Context:
        """The prompt in the fields `prompt` and `input`.

        Raises:
            RowError: it is missing or malformed, or ends with a turn of the assistant.
        """
        name, value = row.column("prompt"), row.get("prompt")
        if isinstance(value, list | tuple) or (self.markers and self.markers.begins(str(value))):
            messages = self._whole(self._messages(value, name), name)
            messages = messages if messages[-1]["content"] else messages[:-1]  # the marker of the turn to be written
            if not messages or messages[-1]["role"] != "user":
                raise RowError(f"`{name}` does not end with a turn of the user")
            return Context(messages)
        text = row.text("prompt", verbatim=self.verbatim)
        input = row.text("input", optional=True) if row.has("input") else ""
        return Context([{"role": "user", "content": text}], input, self.verbatim and not input)

    def references(self, row: Row, optional: bool) -> list[str]:
        """The first reference answer of a row of the format `prompt`, as a list; empty if it has none.

        Raises:
            RowError: it is no text or, unless it is `optional`, an empty one.
        """
        name, value = row.column("reference"), row.get("reference")
        if isinstance(value, list | tuple):
            first = value[0] if value else None
            value = read_messages(value, name, self.tool_turns)[-1]["content"] if isinstance(first, Mapping) else first
        if value is None:
            return []
        text = checked_text(value, name, optional=optional)
        return [text if self.verbatim else tidied(text)]

    def answers(self, row: Row) -> tuple[Context, list[str]]:
        """The prompt and all answers of a row of any format that has both.

        Raises:
            RowError: the row is bad.
        """
        match row.format:
            case "completion":
                fields = ["completion"]
            case "preference":
                fields = ["chosen", "rejected"]
            case "choice" | "two scores":
                fields = ["output_1", "output_2"]
            case _:
                name, values = row.column("answers"), row.get("answers")
                if not isinstance(values, list | tuple) or len(values) < 2:
                    raise RowError(f"`{name}` is not a list of two answers or more")
                return self._continued(row, [(name, value) for value in values])
        return self._continued(row, [(row.column(field), row.get(field)) for field in fields])

    def best(self, row: Row, answers: Sequence[str]) -> str:
        """The best one of a row's answers, the first of equals.

        Raises:
            RowError: a bad annotation, or an annotator's tie that is to be skipped.
        """
        match row.format:
            case "completion":
                if row.has("label") and not _truth(row.get("label"), row.column("label")):
                    raise RowError(f"`{row.column('label')}` says that the answer is bad")
                return answers[0]
            case "preference":
                return answers[0]
            case "choice":
                return answers[self.choosing.by_preference(row, answers)[0][0]]
        scores = self._scores(row, len(answers))
        return answers[scores.index(max(scores))]

    def pairs(self, row: Row, answers: Sequence[str]) -> list[Pair]:
        """The pairs of a row's answers, without those of identical texts.

        Raises:
            RowError: a bad annotation, or no pair.
        """
        match row.format:
            case "preference":
                pairs = self._labelled_pair(row, answers)
            case "choice":
                pairs = self.choosing.by_preference(row, answers)
            case _:
                pairs = self.choosing.by_scores(self._scores(row, len(answers)), answers)
        different = [pair for pair in pairs if answers[pair[0]] != answers[pair[1]]]
        if not different:
            raise RowError(
                f"{listed([(row.column(field), None) for field in ANSWERS if field in row.names])} are identical"
            )
        if row.format == "ranks":  # the difference of two ranks is no margin
            return [(better, worse, None) for better, worse, _ in different]
        return different

    def _labelled_pair(self, row: Row, answers: Sequence[str]) -> list[Pair]:
        """The pair of `chosen` and `rejected`, with a margin if both have a score."""
        if not (row.has("score_chosen") and row.has("score_rejected")):
            return [(0, 1, None)]
        scores = [number_of(row.get(field), row.column(field)) for field in ("score_chosen", "score_rejected")]
        if scores[0] < scores[1]:
            raise RowError(f"`{row.column('score_chosen')}` is lower than `{row.column('score_rejected')}`")
        return self.choosing.by_scores(scores, answers)

    def _scores(self, row: Row, count: int) -> list[float]:
        """The scores of `count` answers, the higher the better."""
        if row.format == "two scores":
            return [number_of(row.get(field), row.column(field)) for field in ("score_1", "score_2")]
        name, values = row.column(row.format), row.get(row.format)
        if not isinstance(values, list | tuple) or len(values) != count:
            raise RowError(f"`{name}` is not a list of {count} numbers, one for each answer")
        sign = -1 if row.format == "ranks" else 1
        return [sign * number_of(value, name) for value in values]

    # -- texts and conversations ---------------------------------------------------------------------------------------

    def _continued(self, row: Row, columns: Sequence[tuple[str, Any]]) -> tuple[Context, list[str]]:
        """The prompt of a row and its answers in `columns`: names and values, which may be texts or messages.

        An answer that begins with a turn of the user is a whole conversation, and then the column of the prompt, which
        repeats its beginning, is not read.
        """
        # 1. Texts.
        if self.verbatim and self.markers and not "prompt" in row.names:
            return before_last_turn(
                [checked_text(value, name) for name, value in columns], self.markers, listed(columns)
            )
        if not (self.markers or any(isinstance(value, list | tuple) for _, value in columns)):
            texts = [checked_text(value, name) for name, value in columns]
            if not "prompt" in row.names:
                return common_beginning(texts, listed(columns))
            return self.prompt(row), [text if self.verbatim else tidied(text) for text in texts]
        # 2. Conversations, in which all turns but the last belong to the prompt.
        found = [(name, self._messages(value, name, answer="prompt" in row.names)) for name, value in columns]
        for name, messages in found:
            if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
                raise RowError(f"`{name}` does not end with a turn of the assistant")
        name, first = found[0]
        if any(messages[:-1] != first[:-1] for _, messages in found):
            raise RowError(f"{listed(columns)} differ before their last turn")
        answers = [messages[-1]["content"] for _, messages in found]
        if first[0]["role"] != "assistant" or not "prompt" in row.names:
            return Context(self._whole(first, name)[:-1]), answers
        context = self.prompt(row)
        return (Context([*context.messages, *first[:-1]]) if first[:-1] else context), answers

    def _messages(self, value: Any, name: str, answer: bool = False) -> list[Message]:
        """The messages of a list or, with markers, of a text; a text without a marker may be an `answer`."""
        if value is None:
            raise RowError(f"no `{name}`")
        if not isinstance(value, str):
            return read_messages(value, name, self.tool_turns)
        text = checked_text(value, name)
        if answer and (self.markers is None or not self.markers.begins(text)):
            return [{"role": "assistant", "content": tidied(text)}]
        if self.markers is None:
            raise RowError(f"`{name}` is a text, not a list of messages")
        return self.markers.split(text, name)

    def _whole(self, messages: list[Message], name: str) -> list[Message]:
        """The messages of a whole conversation, which begins with the user, maybe after a system message."""
        start = messages[1:] if messages[0]["role"] == "system" else messages
        if not start or start[0]["role"] != "user":
            raise RowError(f"`{name}` does not begin with a turn of the user")
        return messages


def _truth(value: Any, name: str) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(value).strip().lower() not in known:
        raise RowError(f"`{name}` is not true or false")
    return known[str(value).strip().lower()]
