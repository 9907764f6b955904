"""Models that were not trained here: a folder or a repository of the Hub, with all weights or with a peft adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.records import DataSource, Prompt
from rlhf.errors import RunError
from rlhf.settings import Settings

if TYPE_CHECKING:
    from rlhf.models.released import Checkpoint

CHAT = "chat:"


@dataclass(frozen=True)
class OutsideModel:
    """A policy that was not trained here.

    Attributes:
        label: A short name for tables.
        checkpoint: Its files.
        chat: Whether prompts are put into the model's own chat template instead of the data set's.
    """

    label: str
    checkpoint: "Checkpoint"
    chat: bool = False

    @classmethod
    def find(cls, label: str, name: str, chat: bool) -> "OutsideModel":
        """The model or adapter in a folder or on the Hub (`OWNER/NAME[@REVISION]`); no weights are fetched yet.

        Raises:
            ConfigError: there is none, its files are not whole, or the base of an adapter cannot be found.
            RunError: the model generates no text, or has no chat template to read.
        """
        from rlhf.models.released import find  # imports torch

        checkpoint = find("policy", name)
        if checkpoint.scores:
            kind = "a classifier or reward model"
            raise RunError(f"{name} is {kind}, which generates no text; allowed: a causal language model")
        _ = checkpoint.config  # raises now if there is no model
        checkpoint.check_weights()
        checkpoint.check_tokenizer()
        if chat and checkpoint.tokenizer is not None and not checkpoint.tokenizer.chat_template:
            raise RunError(f"{label}: the model has no chat template; allowed: the same without `{CHAT}`")
        return cls(label, checkpoint, chat)

    def identity(self, known: Path | None = None) -> dict[str, Any]:
        """The content of the folders, or the commits of the repositories."""
        return {"model": self.checkpoint.identity(known), "chat": self.chat}

    def fetch(self) -> None:
        """Download the weights, if they are on the Hub and not in its local cache.

        Raises:
            ConfigError: they cannot be fetched.
        """
        for part in (self.checkpoint, self.checkpoint.whole):
            part.complete()

    def answers(self, prompts: Sequence[Prompt], settings: Settings, source: DataSource) -> list[str]:
        """Sample one answer per prompt, on weights of `settings.model.dtype` and `settings.quantization`.

        Raises:
            ConfigError: the weights cannot be fetched.
            RunError: the model has no chat template, or it refuses a prompt.
            ModelError: the model cannot be loaded.
        """
        from rlhf.finished import answering  # imports torch

        part, tokenizer = answering.load_outside(self.checkpoint, settings)
        template = None
        if self.chat:
            if not tokenizer.chat_template:
                raise RunError(f"{self.label}: the model has no chat template; allowed: the same without `{CHAT}`")
            template = ChatTemplate(tokenizer.name_or_path, trust_remote_code=settings.model.trust_remote_code)
        return answering.sample(self.label, part, tokenizer, prompts, settings, source, template)
