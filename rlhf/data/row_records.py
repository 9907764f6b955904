"""From a row of a known format to the records of a split."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.data.column_maps import Row
from rlhf.data.contexts import Context
from rlhf.data.records import Demonstration, Prompt, ScoredComparison, Split
from rlhf.data.row_formats import Reader
from rlhf.data.split_sources import normalized
from rlhf.data.splitting import Shares
from rlhf.data.templates import PromptTemplate
from rlhf.data.threads import Pairing
from rlhf.errors import RowError

HELD_OUT: dict[Split, Split] = {"sft": "sft_validation", "preference": "preference_validation", "prompts": "eval"}
"""Training split → the split for which some of its rows can be held out."""


@dataclass(frozen=True, slots=True)
class KeptPrompt(Prompt):
    """A prompt with further columns of its row, as JSON."""

    kept: str = "{}"


@dataclass(frozen=True)
class ToRecords:
    """Makes the records of a row of `split`.

    `excluded` are the normalized evaluation instructions. With `shares`, the row belongs to `split` only if they say so
    of its first message. Prompts are of the class `KeptPrompt` if columns are to `keep`.
    """

    split: Split
    template: PromptTemplate
    reader: Reader
    pairing: Pairing
    all_turns: bool
    excluded: set[str]
    shares: Shares | None
    keep: tuple[str, ...] = ()

    def __call__(self, row: Row) -> list[Any]:
        """The records of a row, none if it belongs to another split.

        Raises:
            RowError: the row is bad.
        """
        if row.format == "text":
            text = row.text("text", verbatim=self.reader.verbatim)
            return [Demonstration("", text)] if self._belongs(text) else []
        examples = list(self._examples(row))
        first = next(message for message in examples[0][0].messages if message["role"] == "user")
        if not self._belongs(first["content"]):
            return []
        if any(normalized(context.instruction) in self.excluded for context, _ in examples):
            raise RowError("instruction is in the evaluation set")
        records = [record for context, answers in examples for record in self._records(row, context, answers)]
        if not self.keep or self.split not in ("prompts", "eval"):
            return records
        kept = json.dumps({name: row.values.get(name) for name in self.keep}, default=str)
        return [KeptPrompt(**asdict(record), kept=kept) for record in records]

    def _belongs(self, key: str) -> bool:
        """Whether a prompt belongs to this split and not to the one that it is held out for, or from."""
        if self.shares is None:
            return True
        held = self.shares.split_of(normalized(key))
        return held == self.split or (held is None and self.split in HELD_OUT)

    def _examples(self, row: Row) -> Iterator[tuple[Context, list[str]]]:
        """Yield prompts with their answers: several if all turns of a conversation are demonstrations."""
        if row.format == "prompt":
            yield self.reader.prompt(row), self.reader.references(row, self.split == "prompts")
        elif row.format == "messages":
            messages, name = self.reader.conversation(row), row.column("messages")
            asks = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if self.split not in ("prompts", "eval") and messages[-1]["role"] != "assistant":
                raise RowError(f"`{name}` does not end with a turn of the assistant")
            for i in asks if self.all_turns and self.split in ("sft", "sft_validation") else asks[-1:]:
                yield Context(messages[: i + 1]), [message["content"] for message in messages[i + 1 : i + 2]]
        else:
            yield self.reader.answers(row)

    def _records(self, row: Row, context: Context, answers: list[str]) -> Iterator[Any]:
        prompt = context.render(self.template)
        match self.split:
            case "sft" | "sft_validation":
                alone = row.format == "messages"
                yield Demonstration(prompt, answers[0] if alone else self.reader.best(row, answers))
            case "preference" | "preference_validation":
                margins = {(better, worse): margin for better, worse, margin in self.reader.pairs(row, answers)}
                for better, worse in zip(*self.pairing.draw(list(margins), prompt), strict=True):
                    yield ScoredComparison(prompt, answers[better], answers[worse], margins[better, worse])
            case "prompts" if row.format != "prompt":  # an answer to a prompt of PPO is no reference unless it says so
                yield Prompt(prompt, instruction=context.instruction)
            case _:
                yield Prompt(prompt, answers[0] if answers else "", context.instruction)
