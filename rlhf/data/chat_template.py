"""The chat template of a tokenizer, as prompt template of a data set (`data/template=chat`)."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import date as Date
from functools import cached_property
from itertools import chain, cycle, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.special_tokens import marked, special_names, unmarked
from rlhf.errors import DataError, RowError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""At least `role` (system, user or assistant) and `content`."""
# Contents that no template writes itself: what surrounds them in a rendered conversation is the template's own.
SYSTEM, USER, ANSWER, LAST = "qzsystemqz", "qzuserqz", "qzanswerqz", "qzlastqz"
ASKED = ({"role": "user", "content": USER},)
ANSWERED = (*ASKED, {"role": "assistant", "content": ANSWER})
CONTINUED = (*ANSWERED, {"role": "user", "content": LAST})
TODAY = re.compile(r"""strftime_now\(\s*(["'])(?P<format>.*?)\1\s*\)""")
"""How a template writes the date of today."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations with the chat template of a tokenizer, as `apply_chat_template` does.

    Names of special tokens inside a content are marked (`rlhf.data.special_tokens`), so that they stay text when the
    rendered prompt is encoded. Nothing is loaded before the first use.

    Attributes:
        name_or_path: The model whose tokenizer has the template, and whose special tokens the template may write.
        tokenizer: Its tokenizer, if that is elsewhere.
        gguf_file: The file in `name_or_path` with its tokenizer, if the model is one of GGUF.
        trust_remote_code: Whether a tokenizer may run code of its own.
        chat_template: A file with another template in Jinja, or the name or folder of a tokenizer that has one; None
            for the tokenizer's own.
        system: The system prompt of conversations that have none; None leaves this to the template.
        options: Variables for the template, such as `enable_thinking`.
        date: The day that a template writes as today (`strftime_now`), so that every day makes the same prompts. The
            default is the one that Llama 3.1's template falls back to.
    """

    name_or_path: str | None
    tokenizer: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    date: str = "2024-07-26"

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt for an instruction, followed by its input if there is one, as the user's only message.

        Raises:
            RowError, DataError: as `render_messages`.
        """
        return self.render_messages(
            [{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]
        )

    def render_messages(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation: it ends where the assistant speaks.

        Raises:
            RowError: the template refuses these messages.
            DataError: there is no template, or it cannot be read.
        """
        return self._checked(messages, True)

    def conversation(self, messages: Sequence[Message]) -> str:
        """A whole conversation, whose last message is the assistant's: what a reward model reads.

        Raises:
            RowError, DataError: as `render_messages`.
        """
        return self._checked(messages, False)

    def answer(self, text: str) -> str:
        """What the model writes to say `text`: with what the template puts around it, up to the end of the turn.

        Examples are an empty block of thoughts before the text, and `<|im_end|>` behind it. What the template writes
        after the end of the turn, such as a line break, is not part of the answer.

        Raises:
            RowError, DataError: as `render_messages`.
        """
        whole = self._checked([*ASKED, {"role": "assistant", "content": text}], False)
        body = next((whole[len(head) :] for head in self._heads if whole.startswith(head)), None)
        if body is None:
            return marked(text, self.special) + self.end
        found = body.find(self.end) if self._closing_has_end else len(body.rstrip())
        return body[:found] + self.end

    def messages_of(self, prompt: str) -> list[dict[str, str]] | None:
        """The messages that `render_messages` made a prompt of, without the system prompt of this configuration.

        None if that cannot be told: the template has another form than one text around each role's content.
        """
        for system in ((), ({"role": "system", "content": SYSTEM},)):
            messages = self._split(prompt, system)
            if messages is not None and self.render_messages(messages) == prompt:
                return messages
        return None

    # -- what the template is ------------------------------------------------------------------------------------------

    @cached_property
    def own_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer whose special tokens the template writes.

        Raises:
            DataError: there is none.
        """
        if self.tokenizer is None and self.name_or_path is None:
            raise DataError(
                "data/template=chat: the model is made from scratch and has no chat template; allowed: "
                "data/template=alpaca, short or question_answer, or model.name_or_path=FOLDER_OR_HUB_ID"
            )
        return _load(str(self.tokenizer or self.name_or_path), self.trust_remote_code,
                     None if self.tokenizer else self.gguf_file)  # fmt: skip

    @cached_property
    def text(self) -> str:
        """The template itself, in Jinja, with `date` instead of the day on which it is rendered.

        Raises:
            DataError: the tokenizer has none, the one that `chat_template` names cannot be read, or `date` is no day.
        """
        return _on(self.date, self._undated)

    @cached_property
    def _undated(self) -> str:
        name = self.chat_template
        if name is not None and Path(name).expanduser().is_file():
            return Path(name).expanduser().read_text(encoding="utf-8")
        if name is not None and name.endswith((".jinja", ".jinja2")):
            raise DataError(f"data.template.chat_template={name}: there is no such file")
        tokenizer = self.own_tokenizer if name is None else _load(name, self.trust_remote_code)
        try:
            return tokenizer.get_chat_template()
        except ValueError:  # no template, or several without a default
            where = name or self.tokenizer or self.name_or_path
            raise DataError(
                f"data/template=chat: the tokenizer of {where} has no chat template; allowed: "
                "data.template.chat_template with a .jinja file or with the folder or Hub id of a tokenizer that has "
                "one, such as that of the model's chat version, or data/template=alpaca, short or question_answer"
            ) from None

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches the names of the tokenizer's special tokens, where they are not marked as text."""
        return special_names(self.own_tokenizer)

    @cached_property
    def end(self) -> str:
        """The special token that ends the assistant's turn; the tokenizer's EOS if the template writes none.

        Raises:
            DataError: a turn ends with a text that is no special token of this tokenizer.
        """
        closing = self._rendered(ANSWERED, False).rpartition(ANSWER)[2]
        found = self.special.search(closing)
        if found:
            return found[0]
        if closing.strip() or self.own_tokenizer.eos_token is None:
            raise DataError(
                f"data/template=chat: the template ends an answer with {closing.strip()!r}, which is no special token "
                f"of {self.tokenizer or self.name_or_path}; allowed: a template (data.template.chat_template) that "
                f"ends it with one, such as {self.own_tokenizer.eos_token}"
            )
        return str(self.own_tokenizer.eos_token)

    @cached_property
    def earlier_turn(self) -> tuple[str, str]:
        """What begins and ends an earlier answer of a conversation: texts that begin with a special token.

        Raises:
            DataError: the template writes no special token there, so that a content could say the same.
        """
        closing, opening = (self._rendered(ASKED, ask).rpartition(USER)[2] for ask in (False, True))
        before, after = (self._between(CONTINUED, *pair) for pair in ((USER, ANSWER), (ANSWER, LAST)))
        # of a prompt's "<|im_start|>assistant\n<think>\n\n</think>\n\n", an earlier answer may only have the beginning
        both = zip(before.removeprefix(closing), opening.removeprefix(closing), strict=False)
        start = "".join(one for one, other in takewhile(lambda pair: pair[0] == pair[1], both))
        found = self.special.search(start) or self.special.search(before)
        end = self.special.search(after)
        if found is None or end is None:
            raise DataError(
                "data/template=chat: the template writes no special token around the assistant's turns, by which "
                "sft.loss_on=assistant finds them; allowed: sft.loss_on=response, the last turn alone"
            )
        return found.string[found.start() :].rstrip(" "), end[0]

    def check(self) -> None:
        """Check that the template exists, can be rendered, and takes the configured system prompt.

        Raises:
            DataError: it cannot be used.
        """
        try:
            self.render_messages(ASKED)
            _ = self.end
        except RowError as error:
            system = f" with data.template.system={self.system!r}" if self.system else ""
            raise DataError(f"data/template=chat: a single question{system} cannot be rendered: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        # The rows of a data set are cached by the pickle of what renders them, which this decides.
        decisive = (self.text, sorted(self.own_tokenizer.special_tokens_map.items()), self.special.pattern)
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "_decisive": repr(decisive)}

    # -- rendering -----------------------------------------------------------------------------------------------------

    def _checked(self, messages: Sequence[Message], ask: bool) -> str:
        try:
            return self._rendered(messages, ask)
        except DataError:
            raise
        except Exception as error:  # Jinja, or what a template raises itself
            raise RowError(f"the chat template refuses the messages ({first_line(error)})") from None

    def _rendered(self, messages: Sequence[Message], ask: bool) -> str:
        roles = [message["role"] for message in messages]
        own = [{"role": "system", "content": self.system}] if self.system and "system" not in roles[:1] else []
        plain = [
            {key: marked(value, self.special) if isinstance(value, str) else value for key, value in message.items()}
            for message in (*own, *messages)
        ]
        return str(
            self.own_tokenizer.apply_chat_template(
                plain, chat_template=self.text, tokenize=False, add_generation_prompt=ask, **self.options
            )
        )

    @cached_property
    def _heads(self) -> tuple[str, str]:
        """What stands before an answer to `ASKED`: the prompt, or else (if that has more) the conversation so far."""
        return self._rendered(ASKED, True), self._rendered(ANSWERED, False).partition(ANSWER)[0]

    @cached_property
    def _closing_has_end(self) -> bool:
        return self.special.search(self._rendered(ANSWERED, False).rpartition(ANSWER)[2]) is not None

    def _between(self, messages: Sequence[Message], first: str, second: str) -> str:
        return self._rendered(messages, True).partition(first)[2].partition(second)[0]

    def _split(self, prompt: str, system: tuple[Message, ...]) -> list[dict[str, str]] | None:
        """Split a prompt at what the template writes between the messages of `system` and `CONTINUED`."""
        try:
            probe = self._rendered([*system, *CONTINUED], True)
        except Exception:  # a template without system messages
            return None
        gaps = re.split(f"{SYSTEM}|{USER}|{ANSWER}|{LAST}", probe)  # of as many contents as there are messages
        if len(gaps) != len(system) + 4 or not all(gaps[1:-1]):
            return None
        first, *inner, last = gaps
        if not (prompt.startswith(first) and prompt.endswith(last)):
            return None
        contents, rest = list[str](), prompt[len(first) : len(prompt) - len(last)]
        for gap in chain(inner[:-2], cycle(inner[-2:])):  # behind the system message; between the turns
            content, found, rest = rest.partition(gap)
            contents.append(unmarked(content))
            if not found:
                break
        roles = chain((message["role"] for message in system), cycle(("user", "assistant")))
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        return messages if messages[-1]["role"] == "user" else None


def _on(date: str, template: str) -> str:
    """The template with the date as text, instead of the calls that make one of today's."""
    try:
        day = Date.fromisoformat(str(date))
    except ValueError:
        raise DataError(f"data.template.date={date} is no day; allowed: one such as 2024-07-26") from None
    dated = TODAY.sub(lambda call: json.dumps(day.strftime(call["format"])), template)
    if "strftime_now(" in dated:
        raise DataError("data/template=chat: the template writes today's date in a way that data.template.date cannot "
                        "replace; allowed: one that calls strftime_now with a format in quotes")  # fmt: skip
    return dated


def _load(name: str, trust_remote_code: bool, gguf_file: str | None = None) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # imports torch, for which commands that only look at runs do not wait

    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # only the tokenizer's files, or the network, can be at fault
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"data/template=chat: no tokenizer could be loaded from {name} ({reason})") from error
