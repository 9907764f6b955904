"""Differences between architectures: dropout, positions, adapters on transposed layers, memory, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from rlhf.data.farm import Farm
from rlhf.errors import ConfigError
from rlhf.models.activations import Passes
from rlhf.models.architecture import check_architecture, max_positions
from rlhf.models.assembly import lora_config
from rlhf.models.export import save_adapter, save_model
from rlhf.models.linear_layers import linear_names
from rlhf.models.loading import load_causal_lm, skeleton
from rlhf.models.memory import Work, estimate
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.models.sizes import Sizes
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.native import NativeEngine
from rlhf.schema import ALL_LINEAR
from rlhf.scorers import Context
from rlhf.scorers.classifier import ClassifierScorer
from rlhf.settings import LoraSettings, ModelSettings
from tests.helpers.composed_config import compose_and_check, composed_settings
from tests.helpers.tiny_models import EOS, SPECIAL, randomize_lora_b, word_tokenizer

H = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NOISE = {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3}
ROPE = {**H, "intermediate_size": 32, "max_position_embeddings": 40}
MOE = {**ROPE, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
# model type, its shape with all kinds of dropout that it has, and the size of its position table
KINDS: dict[str, tuple[dict[str, Any], int | None]] = {
    "opt": ({**H, **NOISE, "ffn_dim": 32, "max_position_embeddings": 40, "word_embed_proj_dim": 32}, 40),
    "xglm": ({"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32, **NOISE}, None),
    "biogpt": ({**ROPE, "activation_dropout": 0.3, "layerdrop": 0.3}, 40),
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "attn_pdrop": 0.3}, 40),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40}, 40),
    "gptj": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "rotary_dim": 8, "attn_pdrop": 0.3}, 40),
    "gpt_neo": ({"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
                 "max_position_embeddings": 40, "attention_dropout": 0.3}, 40),
    "mpt": ({"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 40, "resid_pdrop": 0.3}, 40),
    "gpt_neox": ({**ROPE, "attention_dropout": 0.3, "hidden_dropout": 0.3}, None),
    "falcon": ({**H, "attention_dropout": 0.3, "hidden_dropout": 0.3}, None),
    "mixtral": ({**MOE, "router_jitter_noise": 0.3, "attention_dropout": 0.3}, None),
    "phimoe": ({**MOE, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3, "attention_dropout": 0.3}, None),
}  # fmt: skip
IDS = torch.randint(3, 50, (4, 20), generator=torch.Generator().manual_seed(0))


def made(kind: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SPECIAL, **options}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model


def model_at(folder: Path) -> ModelSettings:
    return ModelSettings("x", str(folder), max_prompt_tokens=8)


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_a_base_is_the_function_that_it_is_in_evaluation(tmp_path: Path, kind: str) -> None:
    """Dropout is found whatever the architecture calls it and wherever it reads the rate from."""
    save_model(made(kind, **KINDS[kind][0]), word_tokenizer(), tmp_path)
    model = load_causal_lm(model_at(tmp_path), word_tokenizer())
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS, use_cache=False).logits
        for seed in range(3):
            torch.manual_seed(seed)
            torch.testing.assert_close(model.train()(input_ids=IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_as_many_as_the_model_can_read(tmp_path: Path, kind: str) -> None:
    shape, limit = KINDS[kind]
    model = made(kind, **shape).eval()
    assert max_positions(model) == limit
    with torch.no_grad():
        model(input_ids=torch.full((1, 40), 5), use_cache=False)
        if limit is None:
            model(input_ids=torch.full((1, 41), 5), use_cache=False)
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, 41), 5), use_cache=False)


CUSTOM = ["model=custom", "model.max_prompt_tokens=64"]
GPT2 = "model.config={model_type:gpt2,n_embd:32,n_layer:2,n_head:2,n_positions:200}"
HERE = [GPT2, "data=farm", "lora.target_modules=[c_attn]", "reward.lora.target_modules=[c_proj]"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            [*HERE, "sft.max_length=201"],
            "sft.max_length=201: model.config .GPT2LMHeadModel. has 200 positions; allowed",
        ),
        ([*HERE, "reward.max_length=201"], "reward.max_length=201: "),
        (
            [*HERE, "generation.max_new_tokens=137"],
            "max_prompt_tokens=64 and generation.max_new_tokens=137 .201 tokens",
        ),
        ([*HERE, "evaluation.max_new_tokens=137"], "max_prompt_tokens=64 and evaluation.max_new_tokens=137 "),
        (
            [*HERE, "stage=preferences", "preferences=simulated", "preferences.max_new_tokens=137"],
            "preferences.max_new",
        ),
        (["model.config={model_type:mamba,hidden_size:32,num_hidden_layers:1}"], "has no attention heads"),
        (["model.config={model_type:rwkv,hidden_size:32,num_hidden_layers:1}"], "has no attention heads"),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_before_anything_is_made(overrides: list, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        compose_and_check(*CUSTOM, *overrides)
    if overrides[:1] == [GPT2]:
        compose_and_check(*CUSTOM, *overrides[:3], "generation.max_new_tokens=136")
        compose_and_check(*CUSTOM, *overrides, "stage=sft", "sft.max_length=200")


def test_a_checkpoint_that_is_quantized_already_is_refused() -> None:
    for stored in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}):
        lm = made("llama", **ROPE)
        lm.config.quantization_config = stored
        with pytest.raises(ConfigError, match=r"already quantized .*16 or 32 bits"):
            check_architecture(lm, ModelSettings("x", "there", max_prompt_tokens=8), {})


STRANGE = {
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    "mamba2": {"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16},
    "nested": {"model_type": "gemma3", "text_config": {**ROPE, "num_key_value_heads": 2, "head_dim": 16},
               "vision_config": {**H, "intermediate_size": 32, "image_size": 28, "patch_size": 14}},
    "llama4": {"model_type": "llama4", "text_config": {**MOE, "head_dim": 16, "intermediate_size_mlp": 32},
               "vision_config": {**H, "intermediate_size": 32, "image_size": 28, "patch_size": 14}},
    "a size for each layer": {"model_type": "gemma3n_text", **ROPE, "num_key_value_heads": 2, "head_dim": 16,
                              "intermediate_size": [32, 64],
                              "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0]},
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_the_memory_of_any_configuration_is_estimated(kind: str) -> None:
    own = composed_settings()
    own.model.config, own.lora.r = STRANGE[kind], 0  # no adapter is merged
    lm = skeleton(own.model, 500)
    sizes = Sizes(lm)
    needed = estimate(own, sizes, Work(reward_model=False))
    assert needed.weights == 4 * sum(p.numel() for p in lm.parameters())
    cached = 0 if kind.startswith("mamba") else 2 * (2 * 16)  # two layers with two heads each
    assert Passes(own, sizes).cache(3, 50) == 4 * 2 * 3 * 50 * cached  # float32 keys and values


TARGETS = ["c_attn", "c_proj", "c_fc"]


def test_an_adapter_on_transposed_layers_is_pefts_everywhere(tmp_path: Path) -> None:
    """GPT-2's Conv1D: the forward pass, merged for scoring and decoding, copied and exported."""
    save_model(made("gpt2", **KINDS["gpt2"][0]).eval(), word_tokenizer(), tmp_path / "base")
    base = load_causal_lm(model_at(tmp_path / "base"), word_tokenizer())
    assert linear_names(base) == set(TARGETS)
    roles = Roles(base)
    config = lora_config(LoraSettings(r=4, alpha=8.0, target_modules=ALL_LINEAR), base)
    roles.add_adapter("base", "policy", config)
    roles.table["policy"] = Role("base", "policy")
    randomize_lora_b(roles.adapter_parameters("base", "policy"), 0)
    roles.eval()
    save_adapter(roles, "policy", config, tmp_path / "base", word_tokenizer(), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    prompts, answers = [[3, 4, 5], [6, 7]], [[8, 9, EOS], [11, 12, 13, 14]]
    batch = Sequences.from_lists(prompts, answers)

    def expected(prompts: list, answers: list) -> torch.Tensor:
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = peft(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
        return torch.cat(rows)

    def ours() -> torch.Tensor:
        hidden = roles.states("policy", batch, batch.predicting)
        return roles.token_stats("policy", hidden, batch.target_ids).logprobs

    with torch.no_grad():
        wanted = expected(prompts, answers)
        torch.testing.assert_close(ours(), wanted, rtol=1e-4, atol=1e-5)
        with roles.scoring("policy"):
            torch.testing.assert_close(ours(), wanted, rtol=1e-4, atol=1e-5)
        save_model(roles.copy_trunk("policy"), word_tokenizer(), tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=IDS).logits, peft(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
        request = GenerationRequest(prompts, 6, 1.0, torch.Generator().manual_seed(0))
        found = NativeEngine(EOS).generate(roles, "policy", request)
        sampled = [ids[:n] for ids, n in zip(found.ids.tolist(), found.lengths.tolist(), strict=True)]
        drawn = torch.cat([row[:n] for row, n in zip(found.logprobs, found.lengths.tolist(), strict=True)])
        torch.testing.assert_close(drawn, expected(prompts, sampled), rtol=1e-4, atol=1e-4)


TEXTS = ["w3 w4 w5", "w6", "w7 w8 w9 w10 w11 <eos>", "w9 <eos>"]


@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_published_reward_model_reads_each_text_as_if_it_were_alone(
    tmp_path: Path, kind: str, side: str, pad: str | None
) -> None:
    """Without a pad token, with EOS as the pad token, and with padding on the left."""
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    tokenizer.pad_token = pad
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SPECIAL, **KINDS[kind][0], "pad_token_id": tokenizer.pad_token_id})
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    save_model(model, tokenizer, tmp_path)
    model.config.pad_token_id = None
    plain = AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([plain(text)["input_ids"]])).logits[0, 0] for text in TEXTS]
    ClassifierScorer.check({"model": str(tmp_path), "label": None, "max_length": 40})
    context = Context(Farm(), Farm().tokenizer(), Roles(made("gpt2", **KINDS["gpt2"][0])))
    scorer = ClassifierScorer(context, str(tmp_path), label=None, max_length=40)
    torch.testing.assert_close(scorer.score(TEXTS), torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_classifier_that_cannot_be_used_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", **{**SPECIAL, **KINDS["gpt2"][0]})
    config.num_labels = 1
    save_model(AutoModelForSequenceClassification.from_config(config), word_tokenizer(), tmp_path)
    chosen = ["scorer=hub_reward_model", f"scorer.model={tmp_path}"]
    with pytest.raises(ConfigError, match=r"scorer.max_length=512: .* has 40 positions; allowed: up to 40"):
        compose_and_check(*chosen)
    compose_and_check(*chosen, "scorer.max_length=40")
    with pytest.raises(Exception, match="has no such label"):
        compose_and_check(*chosen, "scorer.max_length=40", "scorer.label=joy")
