"""Each kind of adapter against peft's own layers: forward, merged, switched, exported, as a value function."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.errors import ModelError
from rlhf.models.assembly import _add_value_adapter, lora_config
from rlhf.models.export import load_adapter, save_adapter, save_model
from rlhf.models.linear_layers import linear_names
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.models.sizes import Sizes
from rlhf.settings import LoraSettings
from tests.helpers.ppo_stages import LORA, make_ppo, ppo_settings
from tests.helpers.tiny_models import TARGETS, random_sequences, randomize_lora_b, tiny_lora, tiny_model

PLAIN = LoraSettings(r=4, alpha=8.0)
OPTIONS = {
    "all-linear": replace(PLAIN, target_modules="all-linear"),
    "rslora": replace(PLAIN, rslora=True),
    "dora": replace(PLAIN, dora=True, target_modules="all-linear"),
    "one block": replace(PLAIN, layers_to_transform=[1], target_modules="all-linear"),
    "rank 1": replace(PLAIN, r=1),
    "gaussian": replace(PLAIN, init="gaussian"),
}
CASES = [(name, kind) for name in OPTIONS for kind in ("llama", "neox")]


def option(name: str, kind: str) -> LoraSettings:
    lora = OPTIONS[name]
    return lora if lora.target_modules else replace(lora, target_modules=TARGETS[kind])


def roles_with(name: str, kind: str) -> Roles:
    """A reward adapter, and a policy of the kind `name` whose weights are all somewhere else than at first."""
    roles = Roles(tiny_model(kind))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for role, config in (("reward", tiny_lora(kind)), ("policy", None)):
            roles.add_adapter("base", role, config or lora_config(option(name, kind), roles.trunk("reference")))
            roles.table[role] = Role("base", role)
            randomize_lora_b(roles.parameters_of(role), 1)
        for key, weight in roles.parameters_of("policy").items():
            if "magnitude" in key:
                weight.data *= 1 + 0.3 * torch.randn_like(weight)
    return roles.eval()


@torch.no_grad()
def logits_of(roles: Roles, role: str, batch: Sequences) -> Tensor:
    return roles.output(role)(roles.hidden(role, batch))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_it_computes_what_pefts_own_layers_compute(name: str, kind: str) -> None:
    roles, batch = roles_with(name, kind), random_sequences(3, seed=0)
    own = roles.parameters_of("policy")
    plain = tiny_model(kind)
    inject_adapter_in_model(roles.adapter_config("policy"), plain, adapter_name="policy")
    theirs = {key: value for key, value in plain.named_parameters() if ".lora_" in key}
    assert {key.replace(".policy.", ".") for key in theirs} == own.keys()
    with torch.no_grad():
        for key, value in theirs.items():
            value.copy_(own[key.replace(".policy.", ".")])
        expected = plain(input_ids=batch.ids).logits
    torch.testing.assert_close(logits_of(roles, "policy", batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits_of(roles, "reference", batch), atol=1e-2)
    assert Sizes(tiny_model(kind)).adapter(option(name, kind)) == sum(value.numel() for value in own.values())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_merged_it_is_the_same_and_leaves_no_trace(name: str, kind: str) -> None:
    roles, batch = roles_with(name, kind), random_sequences(3, seed=0)
    before = {key: value.clone() for key, value in roles.state_dict().items()}
    expected, others = logits_of(roles, "policy", batch), [logits_of(roles, r, batch) for r in ("reference", "reward")]
    with roles.merged("policy") as model, torch.no_grad():
        torch.testing.assert_close(model(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        copied = roles.copy_trunk("policy")(input_ids=batch.ids).logits
    torch.testing.assert_close(copied, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(roles, "policy", batch), expected)
    assert all(map(torch.equal, others, [logits_of(roles, role, batch) for role in ("reference", "reward")]))
    assert all(torch.equal(before[key], value) for key, value in roles.state_dict().items())


@pytest.mark.parametrize(("name", "kind"), [("dora", "llama"), ("one block", "neox"), ("rslora", "llama")])
def test_exported_it_loads_with_plain_peft_and_back(
    name: str, kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    roles, batch = roles_with(name, kind), random_sequences(3, seed=0)
    save_model(roles.copy_trunk("reference"), tokenizer, tmp_path / "base")
    config = roles.adapter_config("policy")
    save_adapter(roles, "policy", config, tmp_path / "base", tokenizer, tmp_path / "adapter")
    expected, loaded = logits_of(roles, "policy", batch), AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            loaded.merge_and_unload()(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-4
        )
    other = Roles(tiny_model(kind))
    load_adapter(other, "base", "policy", tmp_path / "adapter")
    other.table["policy"] = Role("base", "policy")
    assert torch.equal(logits_of(other.eval(), "policy", batch), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_saved_adapter_that_rewrites_the_base_is_refused(
    init: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    roles = roles_with("rank 1", "llama")
    config = roles.adapter_config("policy")
    config.init_lora_weights = init
    save_adapter(roles, "policy", config, tmp_path, tokenizer, tmp_path / "adapter")
    fresh = Roles(tiny_model())
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    with pytest.raises(ModelError, match=f"init_lora_weights={init}, which took a part out of the base"):
        load_adapter(fresh, "base", "policy", tmp_path / "adapter")
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_all_linear_layers_are_found_beside_other_adapters(kind: str) -> None:
    roles, plain = roles_with("rank 1", kind), tiny_model(kind)
    assert linear_names(roles.trunk("policy")) == linear_names(plain)
    assert set(lora_config(OPTIONS["all-linear"], roles.trunk("policy")).target_modules) == linear_names(plain)


@pytest.mark.parametrize("reward", ["rslora", "dora", "one block"])
def test_a_value_function_continues_any_reward_adapter(reward: str) -> None:
    """At another rank and scale, with rsLoRA."""
    roles, batch = Roles(tiny_model()), random_sequences(3, seed=0)
    roles.add_adapter("base", "reward", lora_config(option(reward, "llama"), roles.trunk("reference")))
    roles.table["reward"] = Role("base", "reward")
    randomize_lora_b(roles.parameters_of("reward"), 1)
    own = LoraSettings(r=6, alpha=30.0, rslora=True, target_modules=TARGETS["llama"])
    _add_value_adapter(roles, own, roles.adapter_config("reward"))
    roles.eval()
    expected = logits_of(roles, "reward", batch)
    torch.testing.assert_close(logits_of(roles, "value", batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits_of(roles, "reference", batch), atol=1e-2)


def test_the_scale_of_rslora_falls_with_the_root_of_the_rank() -> None:
    assert replace(PLAIN, r=16).scale == 0.5
    assert replace(PLAIN, r=16, rslora=True).scale == 2.0


def test_a_faster_b_has_a_learning_rate_of_its_own(folders: SimpleNamespace, tmp_path: Path) -> None:
    """LoRA+: AdamW's first step moves every weight by its learning rate."""
    settings = ppo_settings(lora=replace(LORA, lr_ratio=16.0), warmup_steps=1)
    stage = make_ppo(settings, folders, tmp_path / "s")
    made = stage.configure_optimizers()
    slow, fast = made["optimizer"].param_groups
    assert (slow["lr"], fast["lr"]) == pytest.approx((1e-2 / 2, 16e-2 / 2))  # warm-up begins at half of the rate
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    assert all(".lora_B." in names[id(parameter)] for parameter in fast["params"])
    assert not any(".lora_B." in names[id(parameter)] for parameter in slow["params"])
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    assert len(slow["params"]) + len(fast["params"]) == len(trained)
    assert {role for role in ("policy", "value") for p in fast["params"] if f".{role}." in names[id(p)]} == {
        "policy", "value",
    }  # fmt: skip
    before = {id(parameter): parameter.detach().clone() for parameter in trained}
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    made["optimizer"].step()
    for group, rate in ((slow, 5e-3), (fast, 8e-2)):
        for parameter in group["params"]:
            torch.testing.assert_close(
                before[id(parameter)] - parameter, torch.full_like(parameter, rate), rtol=1e-2, atol=1e-5
            )
    plain = make_ppo(ppo_settings(), folders, tmp_path / "s").configure_optimizers()["optimizer"]
    assert len(plain.param_groups) == 1


def test_a_lora_config_is_pefts() -> None:
    lora = LoraSettings(
        r=3, alpha=6.0, dropout=0.1, target_modules=["a"], layers_to_transform=[0], rslora=True, dora=True
    )
    expected = LoraConfig(
        r=3,
        lora_alpha=6.0,
        lora_dropout=0.1,
        target_modules=["a"],
        layers_to_transform=[0],
        use_rslora=True,
        use_dora=True,
    )
    assert lora_config(lora, tiny_model()).to_dict() == expected.to_dict()
