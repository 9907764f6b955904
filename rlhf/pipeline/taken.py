"""What a run takes from others instead of training it (`sft.from`, `reward.from`), checked from small files alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from rlhf.data.records import DataSource
from rlhf.errors import ConfigError, explained
from rlhf.models.architecture import check_architecture
from rlhf.models.loading import config_of, load_tokenizer, skeleton
from rlhf.models.released import Checkpoint, find
from rlhf.models.tokenizing import chat_template_of, check_written
from rlhf.pipeline import identity
from rlhf.settings import ModelSettings, Settings, SupervisedSettings
from rlhf.tracking.summary import read_summary

SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
IDS, TEXT, CLASSIFIER = "ids", "text", "classifier"


@dataclass(frozen=True)
class Taken:
    """A checkpoint that takes the place of a product of the cache.

    Attributes:
        product: `sft` or `reward`.
        checkpoint: what is taken.
        difference_to: the model that the checkpoint's weights are differences to.
        reads: what a reward model reads: `ids`, as a role beside the policy; `text`, one of ours on another model;
            `classifier`, anybody's on another model.
    """

    product: str
    checkpoint: Checkpoint
    difference_to: Checkpoint | None = None
    reads: str = IDS

    def identity(self, known: Path | None) -> dict[str, str | None]:
        """What the weights are; `known` is a folder of digests."""
        base = self.difference_to.identity(known) if self.difference_to else None
        return {"from": self.checkpoint.identity(known), "difference_to": base, "reads": self.reads}

    def in_place(self, cache: Path, sft: Path | None = None) -> Path | None:
        """The folder of the cache if it is this very product, on the SFT model of the folder `sft` if it is an adapter.

        A run with it is the same run as one that trains it.
        """
        folder, base = self.checkpoint.folder.parent, self.checkpoint.base
        made_here = self.checkpoint.stage == self.product and folder.parent == cache.resolve()
        on_this = base is None or (sft is not None and base.folder.parent == sft)
        return folder if made_here and on_this and self.reads == IDS else None

    def centred_as(self, config: Mapping[str, Any], source: DataSource) -> bool:
        """Whether a reward model that was made here has its baseline from the demonstrations of `config`."""
        baselines = [
            {
                "rows": chosen.get("reward", {}).get("baseline_rows"),
                "data": identity.decisive(identity.of_data(chosen.get("data", {}), source, ("sft", "sft_validation"))),
            }
            for chosen in (config, self._config)
        ]
        return identity.by_content(baselines[0]) == identity.by_content(baselines[1])

    def settings(self) -> Mapping[str, Any]:
        """The keys with which the product was trained, if it was trained here."""
        found: Mapping[str, Any] = self._config.get(self.product, {})
        return found

    @property
    def _config(self) -> Mapping[str, Any]:
        summary = read_summary(self.checkpoint.folder.parent) or {}
        found: Mapping[str, Any] = summary.get("config", {})
        return found

    @property
    def described(self) -> str:
        """Where it comes from and what becomes of it, for a preview."""
        base = f" added to {self.difference_to.name}" if self.difference_to else ""
        commit = f" at {self.checkpoint.hub[1][:12]}" if self.checkpoint.hub else ""
        use = {
            IDS: "",
            TEXT: ", as a scorer with its own tokenizer",
            CLASSIFIER: ", as a scorer with its own tokenizer",
        }
        return f"taken from {self.checkpoint.name}{commit}{base}{use[self.reads]}"

    @property
    def whole(self) -> bool:
        """Whether it becomes a whole model, not an adapter on the SFT model."""
        return self.difference_to is not None or self.checkpoint.base is None


def taken_of(settings: Settings, source: DataSource) -> dict[str, Taken]:
    """What is taken, by product. Of a model on the Hub, only small files are downloaded.

    Raises:
        ConfigError: a checkpoint cannot be found, or does not fit: one sentence.
    """
    found = {}
    tokenizer = load_tokenizer(settings.model, source) if settings.sft.from_ or settings.reward.from_ else None
    for product, stage in (("sft", settings.sft), ("reward", settings.reward)):
        taken = _taken(product, stage)
        if taken is None:
            continue
        assert tokenizer is not None
        _check_task(taken)
        for checkpoint in (taken.checkpoint, taken.difference_to):
            if checkpoint is not None:
                checkpoint.check_weights()
        if product == "sft":
            _check_sft(taken.checkpoint, settings.model, tokenizer)
        found[product] = taken if product == "sft" else _reward(taken, settings.model, tokenizer)
    if settings.reward.model and settings.reward.from_:
        raise ConfigError(
            f"reward.from={settings.reward.from_} is not trained here, and model@reward.model="
            f"{settings.reward.model.name} says what to train one on; allowed: one of the two"
        )
    return found


def _taken(product: str, stage: SupervisedSettings) -> Taken | None:
    name, base = stage.from_, stage.difference_to
    if name is None:
        if base is not None:
            raise ConfigError(
                f"{product}.difference_to={base} is what weight differences are added to, and there are none; "
                f"allowed: with {product}.from"
            )
        return None
    checkpoint = find(f"{product}.from", name)
    if base is None:
        if name.partition("@")[0].rstrip("/").endswith("-wdiff"):
            raise ConfigError(
                f"{checkpoint} holds weight differences; allowed: with {product}.difference_to=HUB_ID_OR_FOLDER of the "
                "model that they are added to"
            )
        return Taken(product, checkpoint)
    if checkpoint.base or checkpoint.stage:
        raise ConfigError(
            f"{checkpoint} holds whole weights or an adapter, not differences; allowed: {product}.difference_to=null"
        )
    below = find(f"{product}.difference_to", base)
    if below.base or below.scores:
        raise ConfigError(f"{below} is no language model with all its weights, to which differences could be added")
    return Taken(product, checkpoint, below)


def _check_task(taken: Taken) -> None:
    """An SFT model must be a language model, a reward model a classifier with one output."""
    checkpoint, wanted = taken.checkpoint, taken.product == "reward"
    if checkpoint.scores != wanted:
        kind = ("a language model", "a reward model or classifier")[checkpoint.scores]
        allowed = ("a causal language model or an adapter on one", "a sequence classifier with one output")[wanted]
        raise ConfigError(f"{checkpoint} is {kind}; allowed: {allowed}")
    if wanted and checkpoint.outputs != 1:
        raise ConfigError(f"{checkpoint} has {checkpoint.outputs} outputs; allowed: a sequence classifier with one")


def _check_sft(checkpoint: Checkpoint, model: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """The SFT model must have the shape and the vocabulary that `model` says."""
    config = _config(checkpoint, model)
    settings = ModelSettings("taken", str(checkpoint.whole.folder), trust_remote_code=model.trust_remote_code)
    whole = skeleton(settings)
    if whole is not None:
        check_architecture(whole, settings, {})
    differing = _differing(config, model)
    if differing:
        raise ConfigError(
            f"{checkpoint} has {differing}; allowed: a model of the same shape, or model=custom "
            f"model.name_or_path={checkpoint.whole.folder}"
        )
    if config.get_text_config().vocab_size < len(tokenizer) or not _same_tokens(checkpoint, tokenizer):
        raise ConfigError(
            f"{checkpoint} has another vocabulary than the tokenizer of model={model.name} ({len(tokenizer)} tokens); "
            f"allowed: a model with the same tokens, or model.tokenizer={checkpoint.whole.folder}"
        )


def _reward(taken: Taken, model: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> Taken:
    """Whether the reward model can be a role beside the policy, or must be a scorer of its own."""
    checkpoint = taken.checkpoint
    if taken.difference_to or checkpoint.alpaca_farm:
        if taken.difference_to:
            differing = _differing(_config(taken.difference_to, model), model)
            if differing:
                raise ConfigError(f"{taken.difference_to} has {differing}; allowed: a model of the policy's shape")
        if not _same_tokens(checkpoint, tokenizer):
            raise ConfigError(f"{checkpoint} has another vocabulary than the policy; allowed: the policy's")
        return taken
    config = _config(checkpoint, model)
    if not _differing(config, model) and _plain_head(config) and _same_tokens(checkpoint, tokenizer):
        return taken
    if checkpoint.tokenizer is None:
        raise ConfigError(f"{checkpoint} has no tokenizer to read texts with; allowed: a model with its tokenizer")
    if not checkpoint.stage:
        return Taken(taken.product, checkpoint, reads=CLASSIFIER)
    if chat := chat_template_of(tokenizer):
        check_written(checkpoint.tokenizer, chat)
    return Taken(taken.product, checkpoint, reads=TEXT)


def _config(checkpoint: Checkpoint, model: ModelSettings) -> PreTrainedConfig:
    with explained(f"{checkpoint}: its configuration cannot be read"):
        return AutoConfig.from_pretrained(checkpoint.whole.folder, trust_remote_code=model.trust_remote_code)


def _differing(config: PreTrainedConfig, model: ModelSettings) -> str:
    """The parts of the shape that differ from the configured model's, in words; empty if none is known to."""
    try:
        own = config_of(model).get_text_config()
    except OSError:  # the Hub cannot be reached
        return ""
    pairs = {key: (getattr(config.get_text_config(), key, None), getattr(own, key, None)) for key in SHAPE}
    told = [f"{key}={theirs} (model={model.name}: {ours})" for key, (theirs, ours) in pairs.items() if theirs != ours]
    return ", ".join(told)


def _same_tokens(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the run has the same id there; true if the checkpoint has no tokenizer."""
    theirs = checkpoint.tokenizer.get_vocab() if checkpoint.tokenizer else None
    return theirs is None or all(theirs.get(token) == number for token, number in tokenizer.get_vocab().items())


def _plain_head(config: PreTrainedConfig) -> bool:
    """Whether its classifier is one matrix on the last hidden state, as a role's head is."""
    with torch.device("meta"):
        head = getattr(AutoModelForSequenceClassification.from_config(config), "score", None)
    return isinstance(head, nn.Linear) and head.bias is None
