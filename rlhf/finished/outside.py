"""Models that were not trained here: a folder or a repository of the Hub, with all weights or with a peft adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.records import DataSource, Prompt
from rlhf.errors import RunError, first_line
from rlhf.files import ADAPTER_CONFIG, read_json
from rlhf.files.digests import content_digest
from rlhf.settings import Settings

CHAT = "chat:"
CONFIG = "config.json"
SMALL = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration and tokenizer
CODE = ("*.py",)
WEIGHTS = ("*.safetensors", "*.bin")
NOT_GENERATING = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


@dataclass(frozen=True)
class Place:
    """Where a model lies: a folder, or a repository of the Hub at a revision, of which `folder` is the local copy."""

    folder: Path
    repository: str | None = None
    revision: str | None = None

    @classmethod
    def fetch(cls, word: str, repository: str, revision: str | None) -> "Place":
        """Fetch the configuration of a repository, without its weights.

        Raises:
            RunError: there is no such repository or revision, or the Hub cannot be reached.
        """
        return cls(_snapshot(word, repository, revision, SMALL), repository, revision)

    def with_weights(self) -> Path:
        """The folder with everything in it; fetches what is missing.

        The weights are of the commit that the configuration is of, whatever has been pushed since.

        Raises:
            RunError: the Hub cannot be reached.
        """
        if self.repository is None:
            return self.folder
        commit, patterns = self.folder.name, (*SMALL, *CODE)
        folder = _snapshot(self.repository, self.repository, commit, (*patterns, WEIGHTS[0]))
        if not any(folder.glob(WEIGHTS[0])):
            folder = _snapshot(self.repository, self.repository, commit, (*patterns, WEIGHTS[1]))
        return folder


@dataclass(frozen=True)
class OutsideModel:
    """A policy that was not trained here.

    Attributes:
        label: The word that named it.
        place: The model, or the adapter.
        base: The model below the adapter; None if `place` has all weights.
        chat: Whether prompts are put into the model's own chat template instead of the data set's.
    """

    label: str
    place: Place
    base: Place | None = None
    chat: bool = False

    @classmethod
    def in_folder(cls, word: str, folder: Path, chat: bool) -> "OutsideModel":
        """The model or adapter in a folder.

        Raises:
            RunError: it holds neither, the model generates no text, or the adapter's base cannot be found.
        """
        return cls._of(f"{CHAT * chat}{folder.resolve().name}", word, Place(folder), chat)

    @classmethod
    def fetch(cls, word: str, repository: str, revision: str | None, chat: bool) -> "OutsideModel":
        """The model or adapter in a repository of the Hub.

        Raises:
            RunError: there is none, or as for `in_folder`.
        """
        return cls._of(word, word, Place.fetch(word, repository, revision), chat)

    @classmethod
    def _of(cls, label: str, word: str, place: Place, chat: bool) -> "OutsideModel":
        adapter = place.folder / ADAPTER_CONFIG
        if not adapter.exists():
            _check_generates(word, place.folder)
            return cls(label, place, chat=chat)
        config = read_json(adapter)
        if config.get("task_type") not in (None, "CAUSAL_LM"):
            raise RunError(f"{word} is an adapter for {config['task_type']}; allowed: one for CAUSAL_LM")
        base = _base(word, place.folder, config)
        _check_generates(word, base.folder)
        return cls(label, place, base, chat)

    def identity(self, known: Path | None = None) -> dict[str, Any]:
        """The content of the folders, or the commits of the repositories."""
        places = [place for place in (self.place, self.base) if place is not None]
        return {
            "models": [
                place.folder.name if place.repository else content_digest(place.folder, known) for place in places
            ],
            "chat": self.chat,
        }

    def answers(self, prompts: Sequence[Prompt], settings: Settings, source: DataSource) -> list[str]:
        """Sample one answer per prompt, on weights of `settings.model.dtype` and `settings.quantization`.

        Raises:
            RunError: the weights cannot be fetched, or the model has no chat template.
            ModelError: the model cannot be loaded.
        """
        from rlhf.finished import answering  # imports torch

        base = self.base.with_weights() if self.base else None
        part, tokenizer = answering.load_outside(self.place.with_weights(), base, settings)
        if self.chat:
            texts, template = answering.in_chat_template(self.label, tokenizer, prompts)
            return answering.sample(part, tokenizer, texts, settings, template)
        return answering.sample(part, tokenizer, [row.prompt for row in prompts], settings, source)


def _base(word: str, folder: Path, config: dict[str, Any]) -> Place:
    """The model below an adapter: as named in its configuration, beside the adapter, or on the Hub."""
    name = str(config.get("base_model_name_or_path"))
    for path in (Path(name).expanduser(), folder / name, folder.parent / name):
        if (path / CONFIG).exists():
            return Place(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise RunError(f"{word} is an adapter of {name}, which is not here; allowed: an adapter whose base is")
    return Place.fetch(f"{word} is an adapter of {name}, which", name, config.get("revision"))


def _check_generates(word: str, folder: Path) -> None:
    """Check that a folder holds a model, and not a classifier.

    Raises:
        RunError: it does not.
    """
    if not (folder / CONFIG).exists():
        raise RunError(
            f"{word}: {folder} holds no {CONFIG}, {ADAPTER_CONFIG} or summary.json; allowed: a model, a peft adapter "
            "or a finished run"
        )
    architectures = read_json(folder / CONFIG).get("architectures") or []
    if any(name.endswith(f"For{kind}") for name in architectures for kind in NOT_GENERATING):
        raise RunError(f"{word} is a {architectures[0]}, which generates no text; allowed: a causal language model")


def _snapshot(word: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    at = f" at {revision}" if revision else ""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # network, Hub, permissions, or an invalid name: any library may raise
        raise RunError(
            f"{word} is neither a file or folder here, nor could it be fetched from the Hub{at} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
