"""Checkpoints that read images, too: their language model is loaded alone, and is what it is within the whole."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.errors import ModelError
from rlhf.finished.answering import load_outside
from rlhf.models.assembly import lora_config
from rlhf.models.export import save_model
from rlhf.models.language_part import language_part
from rlhf.models.loading import config_of, load_causal_lm, load_tokenizer, skeleton
from rlhf.models.merging import merged
from rlhf.models.released import find
from rlhf.models.sizes import Sizes
from rlhf.schema import ALL_LINEAR
from rlhf.settings import LoraSettings, ModelSettings
from tests.helpers.chat_models import chat_tokenizer
from tests.helpers.composed_config import composed_settings
from tests.helpers.tiny_architectures import GEMMA, HALF, SHAPE
from tests.helpers.tiny_models import randomize_lora_b
from tests.helpers.zoo import LINEAR_HEADS

EYES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# model type → what its language model has beside the usual shape, what of it is published for other parts, the template
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "gemma3": ({**GEMMA, **HALF}, {"vision_config": EYES, "mm_tokens_per_image": 4}, "model"),
    "mistral3": (
        {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
        {"vision_config": {"model_type": "pixtral", **EYES}, "tie_word_embeddings": False},
        "brackets",
    ),
    "qwen3_5": (  # of which transformers takes the language model by itself
        {**LINEAR_HEADS, "layer_types": ["linear_attention", "full_attention"]},
        {
            "vision_config": {
                "hidden_size": 16,
                "depth": 1,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 32,
            }
        },
        "thinking",
    ),
}
IDS = torch.arange(3, 60)[None]


def published(folder: Path, kind: str) -> tuple[ModelSettings, PreTrainedTokenizerBase, PreTrainedModel]:
    """A small random checkpoint of a kind as its authors would have saved it, and the model that they saved."""
    text, parts, template = KINDS[kind]
    tokenizer = chat_tokenizer(template)
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**SHAPE, **text, "vocab_size": len(tokenizer), **special}
    # As in Gemma 3's checkpoints, the whole says what ends a text, and its language model does not.
    config = AutoConfig.for_model(kind, text_config=text, eos_token_id=tokenizer.eos_token_id, **parts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSettings(kind, str(folder), max_prompt_tokens=64), tokenizer, model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_alone_has_the_logits_of_the_whole(kind: str, tmp_path: Path) -> None:
    """Also once it is saved: by plain transformers, and here."""
    settings, _, whole = published(tmp_path / "published", kind)
    alone = load_causal_lm(settings, load_tokenizer(settings))
    torch.testing.assert_close(logits(alone), logits(whole))
    assert not [name for name, _ in alone.named_parameters() if re.search("vision|projector", name)]
    save_model(alone, load_tokenizer(settings), tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(plain) is type(alone)
    for again in (plain, load_causal_lm(settings, load_tokenizer(settings), tmp_path / "saved")):
        torch.testing.assert_close(logits(again.eval()), logits(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_and_adapters_are_those_of_the_language_model(kind: str, tmp_path: Path) -> None:
    settings, tokenizer, _ = published(tmp_path, kind)
    lm, planned = load_causal_lm(settings, tokenizer), skeleton(settings)
    assert planned is not None
    assert Sizes(planned).parameters == Sizes(lm).parameters == sum(p.numel() for p in lm.parameters())
    assert config_of(settings).eos_token_id == tokenizer.eos_token_id
    names = set(lora_config(LoraSettings(r=2, target_modules=ALL_LINEAR), lm).target_modules or ())
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name for name in names if not name.startswith("in_proj")} - {"out_proj"} == attention


@pytest.mark.parametrize("kind", KINDS)
def test_a_released_checkpoint_of_such_a_kind_is_a_language_model(kind: str, tmp_path: Path) -> None:
    published(tmp_path, kind)
    assert not find("sft.from", str(tmp_path)).scores


def test_an_adapter_on_the_whole_is_merged_into_it_or_refused(tmp_path: Path) -> None:
    """Into an SFT model it is merged before the language model is taken; on a policy's it would do nothing."""
    settings, tokenizer, whole = published(tmp_path / "published", "gemma3")
    base = whole.name_or_path = str(tmp_path / "published")
    adapted = get_peft_model(whole, LoraConfig(target_modules=".*language_model.*q_proj"))
    randomize_lora_b(dict(adapted.named_parameters()), seed=0)
    adapted.save_pretrained(tmp_path / "adapter")
    found = find("policy", str(tmp_path / "adapter"))
    assert found.base is not None
    save_model(merged(AutoModelForCausalLM, found.base.complete(), found.complete()), tokenizer, tmp_path / "merged")
    torch.testing.assert_close(logits(load_causal_lm(settings, tokenizer, tmp_path / "merged")), logits(adapted))
    with pytest.raises(ModelError, match="no adapter could be put on"):
        load_outside(found, composed_settings(f"model.name_or_path={base}"))


def test_a_plain_language_model_is_its_own_language_part() -> None:
    config = AutoConfig.for_model("gemma3_text", **SHAPE)
    assert language_part(config) is config


def test_a_kind_without_a_causal_language_model_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_vl").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no causal language model can be made from this configuration"):
        skeleton(ModelSettings("x", str(tmp_path), max_prompt_tokens=64))
