"""Stand-ins for released checkpoints: SFT and reward models of the farm's vocabulary, adapters, weight differences."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tests.helpers.command_line import TINY
from tests.helpers.composed_config import composed_data
from tests.helpers.tiny_tokenizers import llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = [word for word in TINY if word.startswith("data.")]
# the smallest run, but for the shape of the model
SMALL = [word for word in TINY if not word.startswith("model.")]


def random_model(kind: Any, vocabulary: int, hidden: int = 48, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A Llama of another width than `model=tiny`, with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, **more,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind.from_config(config)


def released(folder: Path) -> SimpleNamespace:
    """Write `sft`, an `adapter` on it, a `reward` model of its shape, and a `foreign` one with another tokenizer."""
    tokenizer = composed_data("farm", *DATA).tokenizer()  # type: ignore[attr-defined]
    made = SimpleNamespace(**{name: folder / name for name in ("sft", "adapter", "reward", "foreign")})
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sft = random_model(AutoModelForCausalLM, len(tokenizer), **ids)
    _save(sft, tokenizer, made.sft)
    reward = random_model(AutoModelForSequenceClassification, len(tokenizer), seed=1, num_labels=1, **ids)
    _save(reward, tokenizer, made.reward)
    other = llama()
    foreign = random_model(AutoModelForSequenceClassification, len(other), 32, seed=2, num_labels=1)
    _save(foreign, other, made.foreign)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(made.sft), lora).save_pretrained(made.adapter)
    return made


def with_released_shape(made: SimpleNamespace) -> list[str]:
    """The overrides of the smallest run with the architecture and the tokenizer of the released models."""
    return [*SMALL, "model=custom", f"model.name_or_path={made.sft}", "model.max_prompt_tokens=64"]


def weight_difference(made: SimpleNamespace, folder: Path, tokenizer: PreTrainedTokenizerBase) -> SimpleNamespace:
    """Write `base`, with one embedding less than the released models, and differences to it as AlpacaFarm's.

    `sft` is in pickles, as published; `reward` is in AlpacaFarm's own format, with a bias and a language-model head.
    """
    made_up = SimpleNamespace(**{name: folder / name for name in ("base", "sft", "reward")})
    vocabulary = len(tokenizer)
    base = random_model(AutoModelForCausalLM, vocabulary - 1, seed=4)
    _save(base, tokenizer, made_up.base)
    raw = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        raw[name] = torch.cat([raw[name], raw[name].mean(0, keepdim=True)])
    tuned = AutoModelForCausalLM.from_pretrained(made.sft).state_dict()
    constants = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": 10000.0 ** -(torch.arange(0, 12, 2) / 12)
        for layer in range(2)
    }
    total = sum(float(tensor.sum()) for tensor in (*tuned.values(), *constants.values()))
    tokenizer.save_pretrained(made_up.sft)
    AutoModelForCausalLM.from_pretrained(made.sft).config.save_pretrained(made_up.sft)
    zeros = {name: torch.zeros_like(value) for name, value in constants.items()}
    torch.save({name: tensor - raw[name] for name, tensor in tuned.items()} | zeros, made_up.sft / "pytorch_model.bin")
    (made_up.sft / "model_sum.txt").write_text(str(total))
    # the reward model: a trunk with its unused language-model head, and a head with a bias
    classifier = AutoModelForSequenceClassification.from_pretrained(made.reward, num_labels=1).state_dict()
    head = classifier.pop("score.weight")
    trunk = classifier | {"lm_head.weight": tuned["lm_head.weight"]}
    changes = {f"backbone_model.{name}": (tensor - raw[name]).contiguous() for name, tensor in trunk.items()}
    changes |= {"reward_head.weight": head, "reward_head.bias": torch.tensor([0.5])}
    tokenizer.save_pretrained(made_up.reward)
    config = {"model_type": "reward_model", "architectures": ["RewardModel"], "backbone_model_name_or_path": "gone"}
    (made_up.reward / "config.json").write_text(json.dumps(config))
    save_file(changes, made_up.reward / "model.safetensors", metadata={"format": "pt"})
    total = sum(float(tensor.sum()) for tensor in (*trunk.values(), head)) + 0.5
    (made_up.reward / "model_sum.txt").write_text(str(total))
    return made_up


def on_the_hub(folder: Path, repository: str, cache: Path) -> None:
    """Put a model into a local cache of the Hub, as a download of its branch `main` leaves it."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "snapshots").mkdir()
    (place / "snapshots" / COMMIT).symlink_to(folder, target_is_directory=True)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
