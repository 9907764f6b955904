"""What cannot be trained here is refused in one sentence, before a model is made."""

import json
from pathlib import Path

import pytest

from rlhf.errors import ConfigError, ModelError
from tests.helpers.composed_config import compose_and_check

EVERYWHERE = ["lora=r16_all", "lora@reward.lora=r16_all"]
WHOLE_REWARD = ["lora=r16_all", "lora@reward.lora=none"]


def check(kind: str, *overrides: str) -> None:
    config = f"{{model_type: {kind}, num_hidden_layers: 4}}"
    compose_and_check("model=custom", f"model.config={config}", *(overrides or EVERYWHERE))


@pytest.mark.parametrize("kind", ["t5", "bart", "pegasus", "whisper", "t5gemma"])
def test_a_model_with_an_encoder_and_a_decoder(kind: str) -> None:
    """transformers makes a causal language model of BART's decoder, which would be trained without its encoder."""
    message = rf"^model\.config: the model type {kind} has an encoder beside its decoder; allowed: "
    with pytest.raises(ModelError, match=message):
        check(kind)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder(kind: str) -> None:
    """Its attention reads the answer that it is asked for."""
    with pytest.raises(ModelError, match=rf"{kind} has an encoder, which reads texts in both directions; allowed: "):
        check(kind)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv", "xlstm", "falcon_mamba"])
def test_a_state_space(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"has no attention heads but a recurrent state, which .*; allowed: "):
        check(kind)


@pytest.mark.parametrize("kind", ["jamba", "falcon_h1", "qwen3_next", "recurrent_gemma", "bamba", "minimax"])
def test_attention_beside_a_recurrent_state_is_sampled_by_transformers(kind: str) -> None:
    message = (
        r"^generation\.engine=native: \w+ keeps a recurrent state, .* allowed: generation\.engine=transformers, or"
    )
    for stage in ("ppo", "dpo", "best_of_n"):
        with pytest.raises(ConfigError, match=message):
            check(kind, *EVERYWHERE, f"stage={stage}")
    check(kind, *EVERYWHERE, "generation.engine=transformers")
    check(kind, *EVERYWHERE, "stage=sft")


def test_code_that_comes_with_a_model(tmp_path: Path) -> None:
    mapping = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": mapping}))
    (tmp_path / "own.py").write_text("raise RuntimeError('this code ran')\n")
    with pytest.raises(ModelError, match=r"comes with code of its own, .*; allowed: .* model\.trust_remote_code=true$"):
        compose_and_check("model=custom", f"model.name_or_path={tmp_path}", "stage=sft")


@pytest.mark.parametrize("kind", ["granite", "cohere", "olmoe"])
def test_a_whole_reward_model_that_transformers_could_not_load(kind: str) -> None:
    """It was trained to the end before saving it failed."""
    message = r"^lora@reward\.lora=none: .* transformers has none for \w+; allowed: an adapter such as "
    for stage in ("ppo", "reward", "dpo", "best_of_n", "expert_iteration"):
        with pytest.raises(ConfigError, match=message):
            check(kind, *WHOLE_REWARD, f"stage={stage}")
    check(kind, *WHOLE_REWARD, "stage=sft")
    check(kind, *WHOLE_REWARD, "stage=dpo", "scorer=gold")  # it needs none
    check(kind)
    check("llama", *WHOLE_REWARD)


def test_a_name_that_peft_takes_for_experts() -> None:
    message = r"^lora\.target_modules: .* no linear layer named down_proj that an adapter fits; allowed: all-linear"
    with pytest.raises(ConfigError, match=message):
        check("deepseek_v3", "lora.target_modules=[down_proj,o_proj]", "lora@reward.lora=r16_all")


@pytest.mark.parametrize("wrong", ["every-linear", "[1]", "3"])
def test_what_is_no_list_of_names(wrong: str) -> None:
    message = r"^lora\.target_modules=.* is not allowed; allowed: a list of names of linear layers, or all-linear$"
    with pytest.raises(ConfigError, match=message):
        compose_and_check(f"lora.target_modules={wrong}")
