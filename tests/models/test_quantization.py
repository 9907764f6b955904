"""int8 and nf4 base models on a CPU: every role runs, only adapters and heads train, gradients stay accurate."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.data.farm import Farm
from rlhf.models.assembly import lora_config
from rlhf.models.loading import load_causal_lm
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.native import NativeEngine
from rlhf.settings import LoraSettings, ModelSettings
from tests.helpers.composed_config import composed

pytest.importorskip("bitsandbytes")
LORA = LoraSettings(r=4, alpha=32.0, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return Farm().tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return ModelSettings(name="base", name_or_path=str(folder), max_prompt_tokens=32)


def keywords(option: str) -> dict:
    return dict(composed(f"quantization={option}").quantization)


def quantized_roles(model: ModelSettings, tokenizer: PreTrainedTokenizerFast, option: str) -> Roles:
    roles = Roles(load_causal_lm(model, tokenizer, quantization=keywords(option)))
    torch.manual_seed(1)
    roles.add_adapter("base", "policy", lora_config(LORA, roles.trunk("reference")))
    roles.table["policy"] = Role("base", "policy")
    for parameter in roles.adapter_parameters("base", "policy").values():
        torch.nn.init.normal_(parameter, std=0.02)
    roles.train_only("policy")
    return roles


def gradients(roles: Roles, batch: Sequences) -> list[torch.Tensor]:
    roles.train()
    roles.zero_grad()
    hidden = roles.hidden("policy", batch)[batch.predicting]
    roles.token_stats("policy", hidden, batch.target_ids).logprobs.sum().backward()
    return [p.grad.clone() for p in roles.parameters() if p.grad is not None]


@pytest.mark.parametrize("option", ["int8", "nf4"])
def test_gradients_after_a_rollout_are_those_before_it(
    model: ModelSettings, tokenizer: PreTrainedTokenizerFast, option: str
) -> None:
    roles = quantized_roles(model, tokenizer, option)
    batch = Sequences.from_lists([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]])
    before = gradients(roles, batch)
    roles.eval()
    engine = NativeEngine(tokenizer.eos_token_id, False)
    engine.generate(roles, "policy", GenerationRequest([[5, 6], [7]], 8, 1.0, torch.Generator().manual_seed(0)))
    after = gradients(roles, batch)
    assert before
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize(("option", "tolerance"), [("int8", 0.1), ("nf4", 0.4)])
def test_a_quantised_base_is_close_to_the_exact_one(
    model: ModelSettings, tokenizer: PreTrainedTokenizerFast, option: str, tolerance: float
) -> None:
    """The relative error of the hidden states is that of bitsandbytes' rounding."""
    batch = Sequences.from_lists([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]])
    exact = Roles(load_causal_lm(model, tokenizer)).hidden("reference", batch)
    rounded = quantized_roles(model, tokenizer, option).hidden("reference", batch)
    error = (exact - rounded).norm() / exact.norm()
    assert 0 < error < tolerance
