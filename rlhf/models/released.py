"""Checkpoints that others trained, or that earlier runs left: where they lie and what they hold, by their small files.

The weights are downloaded only when they are needed (`Checkpoint.complete`).
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rlhf.errors import ConfigError, DamagedError, first_line
from rlhf.files import ADAPTER_CONFIG, MODEL, NOTE, SUMMARY, read_object
from rlhf.files.digests import content_digest

_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?")
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]  # all but the weights
_TOKENIZER = "tokenizer_config.json"
_BASE = "base_model_name_or_path"  # peft's name of the model below an adapter
_ALPACA_FARM = "reward_model"  # model_type of AlpacaFarm's reward models


@dataclass(frozen=True)
class Checkpoint:
    """A model that exists already.

    Attributes:
        key: the configuration key that names it, for messages.
        name: what the key says.
        folder: its files; of a model on the Hub, the snapshot in the local cache.
        hub: (repository, commit) of a model on the Hub; None for a local folder.
        stage: the stage that made it, if it is a run of this package.
    """

    key: str
    name: str
    folder: Path
    hub: tuple[str, str] | None = None
    stage: str | None = None

    def __str__(self) -> str:
        return f"{self.key}={self.name}"

    @cached_property
    def base(self) -> "Checkpoint | None":
        """The model below an adapter; None if this is a whole model.

        Raises:
            ConfigError: the base is not named, cannot be found, or is an adapter itself.
        """
        if not (self.folder / ADAPTER_CONFIG).exists():
            return None
        adapter = self._read(ADAPTER_CONFIG)
        name, revision = adapter.get(_BASE), adapter.get("revision")
        if not name:
            raise ConfigError(f"{self}: {ADAPTER_CONFIG} does not say {_BASE}; allowed: an adapter that names its base")
        recorded = Path(name)
        moved = [place / "cache" / recorded.parent.name / MODEL for place in self.folder.resolve().parents]
        beside = (self.folder.parent / name, self.folder / name)  # as it was published
        there = next((place for place in (recorded, *moved, *beside) if place.is_dir()), None)
        try:
            found = find(self.key, str(there) if there else f"{name}@{revision}" if revision else name)
        except ConfigError as error:
            raise ConfigError(f"{self}: the base of this adapter cannot be found: {error}") from None
        if (found.folder / ADAPTER_CONFIG).exists():
            raise ConfigError(f"{self}: its base {name} is an adapter itself; allowed: an adapter on a whole model")
        return replace(found, name=self.name)

    @property
    def whole(self) -> "Checkpoint":
        """The whole model: this one, or the base of an adapter."""
        return self.base or self

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json` of the whole model.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        return self.whole._read("config.json")

    @property
    def alpaca_farm(self) -> bool:
        """Whether it is a reward model in AlpacaFarm's own format."""
        return self.config.get("model_type") == _ALPACA_FARM

    @property
    def scores(self) -> bool:
        """Whether it is a classifier or reward model rather than a language model.

        Raises:
            ConfigError: it is neither.
        """
        if self.alpaca_farm:
            return True
        if self.base:
            return self._read(ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        names = self.config.get("architectures") or []
        if any(name.endswith("ForSequenceClassification") for name in names):
            return True
        classes = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
        known = {part for name in classes for part in ([name] if isinstance(name, str) else name)}
        if names and known.isdisjoint(names) and not self.config.get("auto_map"):
            raise ConfigError(
                f"{self} is a {names[0]}; allowed: a causal language model or a sequence classifier of transformers"
            )
        return False

    @property
    def outputs(self) -> int:
        """The number of outputs of a classifier."""
        if self.alpaca_farm or self.base:
            return 1
        return len(self.config.get("id2label") or (0, 0))  # transformers leaves out its default of two labels

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its own tokenizer, or that of its base; None if neither can be read."""
        for folder in dict.fromkeys((self.folder, self.whole.folder)):
            try:
                return AutoTokenizer.from_pretrained(folder)
            except Exception:  # any library may raise; without a tokenizer there is nothing to compare
                continue
        return None

    @property
    def parameters(self) -> int:
        """The number of weights of a whole classifier, from its configuration."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(self.whole.folder)
            return sum(p.numel() for p in AutoModelForSequenceClassification.from_config(config).parameters())

    def identity(self, known: Path | None) -> str:
        """What its weights are: the Hub's commit, or a digest of the files, base included.

        `known` is a folder of digests (`content_digest`).
        """
        if self.hub:
            own = "@".join(self.hub)
        elif self.base:  # the base counts by its content, not by where it lies
            listed = {key: value for key, value in self._read(ADAPTER_CONFIG).items() if key != _BASE}
            weights = [content_digest(path, known) for path in sorted(self.folder.glob("adapter_model.*"))]
            own = hashlib.sha256(json.dumps([listed, weights], sort_keys=True).encode()).hexdigest()
        else:
            own = content_digest(self.folder, known)
        return f"{own} on {self.base.identity(known)}" if self.base else own

    def complete(self) -> Path:
        """The folder with the weights, downloaded if need be: safetensors if there are any.

        Raises:
            ConfigError: they cannot be downloaded.
        """
        if self.hub is None:
            return self.folder
        for kind in ("safetensors", "bin"):
            folder = _snapshot(self.key, self.name, *self.hub, [*_SMALL, f"*.{kind}"])
            if any(folder.glob(f"*.{kind}")):
                return folder
        raise ConfigError(f"{self}: there are no weights; allowed: a repository with *.safetensors or *.bin")

    def check_weights(self) -> None:
        """Check that local weights, an adapter's base included, are there and whole, by the heads of their files.

        In the Hub's local cache an interrupted download leaves no file under its name.

        Raises:
            ConfigError: a file is missing or cut short.
        """
        for part in dict.fromkeys((self, self.whole)):
            if part.hub is None:
                _check_weights(self, part.folder)

    def check_tokenizer(self) -> None:
        """Check that there is a tokenizer, as far as that can be told without running code of its own.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        folders = (self.folder, self.whole.folder)
        tokenizers = [folder / _TOKENIZER for folder in folders if (folder / _TOKENIZER).is_file()]
        own_code = any('"auto_map"' in path.read_text(encoding="utf-8") for path in tokenizers)
        if self.tokenizer is None and not own_code:  # which runs only with model.trust_remote_code
            raise ConfigError(f"{self}: no tokenizer can be read there; allowed: a model with its tokenizer")

    def _read(self, name: str) -> dict[str, Any]:
        if not (self.folder / name).is_file():
            raise ConfigError(f"{self} has no {name}; allowed: the folder or Hub id of a model, or of a finished run")
        try:
            return read_object(self.folder / name)
        except DamagedError as error:
            raise ConfigError(f"{self}: {error}") from None


def find(key: str, name: str) -> Checkpoint:
    """The checkpoint that a key names: a folder, a finished run of this package, or HUB_ID[@REVISION].

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / SUMMARY).exists():
            if (path / NOTE).exists():
                raise ConfigError(f"{key}={name} is a run that has not ended; allowed: a finished one")
            return Checkpoint(key, name, path.resolve())
        try:
            stage = read_object(path / SUMMARY, stage=str)["stage"]
        except DamagedError as error:
            raise ConfigError(f"{key}={name}: {error}") from None
        if not (path / MODEL).is_dir():
            raise ConfigError(
                f"{key}={name}: the run of stage={stage} left no model; allowed: stage=sft, reward or ppo"
            )
        return Checkpoint(key, name, (path / MODEL).resolve(), stage=stage)
    hub = _HUB_NAME.fullmatch(name)
    if hub is None:
        raise ConfigError(f"{key}={name}: there is no such folder; allowed: a folder, or HUB_ID[@REVISION]")
    folder = _snapshot(key, name, hub[1], hub[2], _SMALL)
    return Checkpoint(key, name, folder, hub=(hub[1], folder.name))


def _check_weights(model: Checkpoint, folder: Path) -> None:
    """Check that all files with weights that a folder speaks of are there, and none is cut short."""
    named: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        named |= set(model._read(index.name).get("weight_map", {}).values())
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    absent = sorted(named - {path.name for path in files})
    if absent or not files:
        what = f"{absent[0]} is missing" if absent else "there are no weights"
        raise ConfigError(f"{model}: {what} in {folder}; allowed: a whole model, with all its *.safetensors or *.bin")
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except SafetensorError as error:
            raise ConfigError(
                f"{model}: {path} is damaged, perhaps by an interrupted download ({first_line(error)}); allowed: a "
                "whole model"
            ) from None


def _snapshot(key: str, name: str, repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Download some files of a repository, if they are not in the local cache; returns their folder."""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub, the network or the disk: any library may raise
        raise ConfigError(
            f"{key}={name}: there is no such folder, and the Hub does not give it ({type(error).__name__}: "
            f"{first_line(error)}); allowed: a folder, or HUB_ID[@REVISION]"
        ) from None
