"""The chat template of a tokenizer, as prompt template of a data set (`data/template=chat`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.special_tokens import marked, special_names, unmarked
from rlhf.errors import DataError, RowError, first_line

Message = Mapping[str, Any]
"""At least `role` (system, user or assistant) and `content`."""
# Contents that no template writes itself: what surrounds them in a rendered conversation is the template's own.
SYSTEM, USER, ANSWER, LAST = "qzsystemqz", "qzuserqz", "qzanswerqz", "qzlastqz"
ASKED = ({"role": "user", "content": USER},)
ANSWERED = (*ASKED, {"role": "assistant", "content": ANSWER})
CONTINUED = (*ANSWERED, {"role": "user", "content": LAST})


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
    """

    name_or_path: str | None
    tokenizer: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(self, instruction: str, input: str = "") -> str:
        """The prompt for an instruction, followed by its input if there is one, as the user's only message.

        Raises:
            RowError, DataError: as `render_messages`.
        """
        return self.render_messages([{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}])

    def render_messages(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation: it ends where the assistant speaks.

        Raises:
            RowError: the template refuses these messages.
            DataError: there is no template, or it cannot be read.
        """
        try:
            return self._rendered(messages, True)
        except (DataError, RowError):
            raise
        except Exception as error:  # Jinja, or what a template raises itself
            raise RowError(f"the chat template refuses the messages ({first_line(error)})") from None

    def answer(self, text: str) -> str:
        """What the model writes to say `text`: with what the template puts around it, up to the end of the turn.

        Examples are an empty block of thoughts before the text, and `<|im_end|>` behind it. What the template writes
        after the end of the turn, such as a line break, is not part of the answer.

        Raises:
            RowError, DataError: as `render_messages`.
        """
        try:
            whole = self._rendered([*ASKED, {"role": "assistant", "content": text}], False)
        except (DataError, RowError):
            raise
        except Exception as error:
            raise RowError(f"the chat template refuses the answer ({first_line(error)})") from None
        body = next((whole[len(head) :] for head in self._heads if whole.startswith(head)), None)
        if body is None:
            return marked(text, self.special) + self.end
        found = body.find(self.end) if self._closing_has_end else len(body.rstrip())
        return body[:found] + self.end

    def messages_of(self, prompt: str) -> list[dict[str, str]] | None:
        """The messages that `render_messages` made a prompt of, without the system prompt of this configuration.

        None if that cannot be told: the template has another form than one text around each role's content.
        """
        for system in (self.system, None) if self.system else (None, SYSTEM):
            messages = self._split(prompt, system)
            with_own = [{"role": "system", "content": self.system}] if self.system else []
            if messages is not None and self.render_messages([*with_own, *messages]) == prompt:
                return messages
        return None

    # -- what the template is ------------------------------------------------------------------------------------------

    @cached_property
    def own_tokenizer(self) -> PreTrainedTokenizerBase:
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
        """The template itself, in Jinja.

        Raises:
            DataError: the tokenizer has none, or the one that `chat_template` names cannot be read.
        """
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
    def turn_start(self) -> str:
        """What the template writes before an earlier answer of the assistant, after the end of the user's turn."""
        asked = self._rendered(ASKED, False).rpartition(USER)[2]
        between = self._between(CONTINUED, USER, ANSWER)
        start = between.removeprefix(asked).rstrip(" ")
        return start if self.special.search(start) else between.rstrip(" ")

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

    def _between(self, messages: Sequence[Message], first: str, second: str, ask: bool = True) -> str:
        return self._rendered(messages, ask).partition(first)[2].partition(second)[0]

    def _split(self, prompt: str, system: str | None) -> list[dict[str, str]] | None:
        """Split a prompt at the texts that the template writes between messages; the contents alternate.

        `system` is the content of the system message: `SYSTEM` stands for any, None for no such message.
        """
        own = [{"role": "system", "content": system}] if system else []
        try:
            probe = self._rendered([*own, *CONTINUED], True)
        except Exception:  # a template without system messages
            return None
        head, tail = probe.partition(USER)[0], probe.rpartition(LAST)[2]
        messages: list[dict[str, str]] = []
        if system == SYSTEM:
            before, _, after = head.partition(SYSTEM)
            content, found, rest = prompt.removeprefix(before).partition(after)
            if not prompt.startswith(before) or not found:
                return None
            messages, head, prompt = [{"role": "system", "content": unmarked(content)}], "", rest
        if not prompt.startswith(head) or not prompt.endswith(tail):
            return None
        rest = prompt[len(head) : len(prompt) - len(tail)]
        gaps = (self._between(CONTINUED, USER, ANSWER), self._between(CONTINUED, ANSWER, LAST))
        found, turn = "?", 0
        while found:
            content, found, rest = rest.partition(gaps[turn % 2])
            messages.append({"role": ("user", "assistant")[turn % 2], "content": unmarked(content)})
            turn += 1
        return messages if turn % 2 else None


def _load(name: str, trust_remote_code: bool, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    options = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # only the tokenizer's files, or the network, can be at fault
        raise DataError(
            f"data/template=chat: no tokenizer could be loaded from {name} ({type(error).__name__}: {first_line(error)})"
        ) from error
