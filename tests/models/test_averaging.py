"""The average of several reward models: of their products B A, which is not the product of averages."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from rlhf.errors import ConfigError
from rlhf.files import ADAPTER_CONFIG
from rlhf.models.averaging import average_reward_models, averaged_config, averaged_products
from rlhf.models.export import save_adapter
from rlhf.pipeline.builders.reward import save_full_reward
from tests.helpers.supervised_stages import FULL, reward_stage
from tests.helpers.tiny_models import tiny_lora, tiny_roles


def test_the_average_of_products_is_not_the_product_of_averages() -> None:
    """B₁ A₁ = [[2]] and B₂ A₂ = [[12]] have the mean 7; the averages of B and of A would give 2.5 · 2.5."""
    pairs = [(1.0, 2.0), (4.0, 3.0)]
    adapters = [{"x.lora_A": torch.tensor([[a]]), "x.lora_B": torch.tensor([[b]])} for b, a in pairs]
    averaged = averaged_products(adapters)
    assert averaged["x.lora_A"].tolist() == [[2.0], [3.0]]
    assert averaged["x.lora_B"].tolist() == [[0.5, 2.0]]
    assert (averaged["x.lora_B"] @ averaged["x.lora_A"]).item() == 7.0


def test_the_scale_of_an_average_is_that_of_its_members() -> None:
    assert averaged_config({"r": 4, "lora_alpha": 8}, 4) == {"r": 16, "lora_alpha": 32}
    assert averaged_config({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4)["lora_alpha"] / 16**0.5 == 8 / 4**0.5
    with pytest.raises(ConfigError, match="DoRA"):
        averaged_config({"r": 4, "lora_alpha": 8, "use_dora": True}, 4)


def test_the_averaged_adapter_computes_with_the_mean_of_the_members_weights(
    folders: SimpleNamespace, tmp_path: Path
) -> None:
    """As plain peft reads it: every adapted matrix, and the head, is the mean of the members' merged ones."""
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        roles = tiny_roles()
        for parameter in roles.adapter_parameters("base", "reward").values():
            parameter.data.normal_(std=0.3)
        roles.heads["reward"].weight.data.normal_()
        members.append(tmp_path / str(seed))
        save_adapter(roles, "reward", tiny_lora(), folders.sft, folders.tokenizer, members[-1])
    average_reward_models(members, folders.tokenizer, tmp_path / "average")

    def merged(adapter: Path) -> dict[str, torch.Tensor]:
        base = AutoModelForSequenceClassification.from_pretrained(folders.sft, num_labels=1)
        return PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()

    weights, found = [merged(member) for member in members], merged(tmp_path / "average")
    for key, value in found.items():
        torch.testing.assert_close(value, torch.stack([own[key] for own in weights]).mean(0), rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "average" / ADAPTER_CONFIG).read_text())
    assert config["r"] == 3 * tiny_lora().r


def test_whole_models_are_averaged_parameter_by_parameter(folders: SimpleNamespace, tmp_path: Path) -> None:
    for seed in range(2):
        stage = reward_stage(folders, lora=FULL)
        torch.manual_seed(seed)
        for parameter in stage.roles.parameters():
            parameter.data += torch.randn_like(parameter) / 10
        save_full_reward(stage.roles, folders.tokenizer, folders.sft, tmp_path / str(seed))
    members = [tmp_path / "0", tmp_path / "1"]
    average_reward_models(members, folders.tokenizer, tmp_path / "average")
    *own, found = (load_file(path / "model.safetensors") for path in (*members, tmp_path / "average"))
    for key, value in found.items():
        torch.testing.assert_close(value, (own[0][key] + own[1][key]) / 2)
    assert any(not torch.equal(own[0][key], own[1][key]) for key in found)
