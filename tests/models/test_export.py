"""Models written by stages, loaded by plain transformers and peft."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.errors import ModelError
from rlhf.models.export import load_adapter, save_adapter, save_model, saved_head
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from tests.helpers.tiny_models import random_sequences, tiny_lora, tiny_roles


def logits_of(roles: Roles, role: str, batch: Sequences) -> Tensor:
    with torch.no_grad():
        return roles.output(role)(roles.hidden(role, batch))


def export(roles: Roles, role: str, kind: str, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the base model and the adapter of a role to `folder/base` and `folder/adapter`."""
    save_model(roles.copy_trunk("reference"), tokenizer, folder / "base")
    save_adapter(roles, role, tiny_lora(kind), folder / "base", tokenizer, folder / "adapter")


@pytest.mark.parametrize("kind", ["llama", "tied", "neox"])
def test_an_exported_policy_loads_with_plain_peft(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    roles, batch = tiny_roles(kind), random_sequences(4, seed=0)
    export(roles, "policy", kind, tokenizer, tmp_path)
    expected = logits_of(roles, "policy", batch)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for model in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload(),
    ):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "adapter")
    assert reloaded("w3 w9")["input_ids"] == [3, 9]


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_an_exported_reward_model_loads_with_plain_peft(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str
) -> None:
    roles, batch = tiny_roles(kind), random_sequences(4, seed=0)
    export(roles, "reward", kind, tokenizer, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inside = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        got = model(input_ids=batch.ids.where(inside, 0), attention_mask=inside.long()).logits.squeeze(-1)
        torch.testing.assert_close(got, roles.last_token_scores("reward", batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(saved_head(tmp_path / "adapter"), roles.heads["reward"].weight)


def test_a_saved_adapter_loads_unchanged(
    make_model: Callable, make_roles: Callable, make_lora: Callable, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    roles = make_roles()
    save_adapter(roles, "policy", make_lora(), tmp_path, tokenizer, tmp_path / "adapter")
    other = Roles(make_model())
    config = load_adapter(other, "base", "again", tmp_path / "adapter")
    assert (config.r, config.lora_alpha) == (4, 8)
    saved, loaded = roles.adapter_parameters("base", "policy"), other.adapter_parameters("base", "again")
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    with pytest.raises(ModelError, match="made for another model"):
        load_adapter(Roles(make_model(layers=3)), "base", "x", tmp_path / "adapter")
    with pytest.raises(ModelError, match="arget modules"):
        load_adapter(Roles(make_model("neox")), "base", "x", tmp_path / "adapter")
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(roles, "reference", make_lora(), tmp_path, tokenizer, tmp_path / "none")
