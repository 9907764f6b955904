"""Which layers an adapter is put on, and what `all-linear` means."""

import pytest
import torch

from rlhf.models.assembly import lora_config
from rlhf.models.linear_layers import linear_names
from rlhf.models.roles import Roles
from rlhf.models.sizes import Sizes
from rlhf.settings import LoraSettings
from tests.helpers.zoo import ZOO, animal
from tests.helpers.zoo_runs import ADAPTERS

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
EXPECTED = {
    "llama2": LLAMA, "gemma3": LLAMA, "olmo2": LLAMA, "gpt_neox": NEOX, "falcon": NEOX, "bloom": NEOX,
    "gpt2": {"c_attn", "c_proj", "c_fc"}, "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "mixtral": ATTENTION, "gpt_oss": ATTENTION,
    # gate_proj and its like are peft's names of experts there
    "deepseek_v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_linear_layers_are_named(name: str) -> None:
    assert linear_names(animal(name)[0]) == EXPECTED[name]


@pytest.mark.parametrize("name", ZOO)
def test_all_of_them_get_an_adapter_however_many_there_are_already(name: str) -> None:
    """Nothing else gets one, and as many parameters as the estimate of memory counts."""
    model, _ = animal(name)
    names, counted = linear_names(model), Sizes(model).adapter(ADAPTERS)
    roles = Roles(model)
    for adapter in ("policy", "value"):
        config = lora_config(ADAPTERS, model)
        assert set(config.target_modules) == names
        roles.add_adapter("base", adapter, config)
        found = roles.adapter_parameters("base", adapter)
        assert {path.split(".lora_")[0].rpartition(".")[2] for path in found} == names
        assert sum(parameter.numel() for parameter in found.values()) == counted
    roles.table["policy"] = roles.table["reference"]._replace(adapter="policy")
    assert linear_names(roles.copy_trunk("policy")) == names


def test_a_list_is_taken_as_it_is() -> None:
    model, _ = animal("llama2")
    lora = LoraSettings(r=2, alpha=4.0, target_modules=["q_proj"])
    with torch.no_grad():
        assert lora_config(lora, model).target_modules == {"q_proj"}
    assert Sizes(model).adapter(lora) == 2 * 2 * (32 + 32)
