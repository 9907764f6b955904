"""Roles on a shared base against plain peft models: outputs, switching, merging."""

import time
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences

KINDS = ["llama", "tied", "neox"]
ROLES = ["policy", "value", "reward"]


def logits_of(roles: Roles, role: str, batch: Sequences) -> Tensor:
    with torch.no_grad():
        return roles.output(role)(roles.hidden(role, batch))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all base weights, without those of LoRA."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" not in name}


def assert_same(before: dict[str, Tensor], model: nn.Module) -> None:
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def peft_twin(kind: str, roles: Roles, make_model: Callable, make_lora: Callable) -> PeftModel:
    """The same base and adapters in peft's own classes."""
    twin = get_peft_model(make_model(kind), make_lora(kind), adapter_name="policy")
    for name in ROLES[1:]:
        twin.add_adapter(name, make_lora(kind))
    weights = dict(twin.named_parameters())
    for name in ROLES:
        for key, value in roles.adapter_parameters("base", name).items():
            weights[f"base_model.model.{key.removesuffix('.weight')}.{name}.weight"].data.copy_(value)
    return twin.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_roles_equal_plain_peft(
    make_model: Callable, make_roles: Callable, make_lora: Callable, make_texts: Callable, kind: str
) -> None:
    roles, batch = make_roles(kind), make_texts(4, seed=0)
    twin = peft_twin(kind, roles, make_model, make_lora)
    seen = []
    with torch.no_grad():
        for name in [*ROLES, "policy"]:  # and switched back
            twin.set_adapter(name)
            expected = twin(input_ids=batch.ids).logits
            torch.testing.assert_close(logits_of(roles, name, batch), expected, rtol=1e-5, atol=1e-5)
            seen.append(expected)
        with twin.disable_adapter():
            expected = twin(input_ids=batch.ids).logits
        torch.testing.assert_close(logits_of(roles, "reference", batch), expected, rtol=1e-5, atol=1e-5)
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate([*seen[:3], expected]) for b in seen[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_base_bit_for_bit(
    make_model: Callable, make_roles: Callable, make_texts: Callable, kind: str
) -> None:
    roles, batch = make_roles(kind), make_texts(4, seed=0)
    with torch.no_grad():
        expected = make_model(kind)(input_ids=batch.ids, use_cache=False).logits
    assert torch.equal(logits_of(roles, "reference", batch), expected)
    logits_of(roles, "value", batch)
    assert torch.equal(logits_of(roles, "reference", batch), expected)


def test_scalar_heads_read_the_last_token(make_roles: Callable, make_texts: Callable) -> None:
    roles, batch = make_roles(), make_texts(5, seed=3)
    with torch.no_grad():
        scores = roles.last_token_scores("reward", batch)
        for i, length in enumerate(batch.lengths.tolist()):
            alone = Sequences.from_lists([batch.ids[i, :length].tolist()], [[]])
            expected = roles.hidden("reward", alone)[0, -1] @ roles.heads["reward"].weight[0]
            assert float(scores[i]) == pytest.approx(float(expected), abs=1e-4)


# -- switching -------------------------------------------------------------------------------------------------------


def state(roles: Roles) -> list[tuple[object, bool]]:
    return [(tuple(layer._active_adapter), layer._disable_adapters) for layer in roles._layers["base"]]


@pytest.mark.parametrize("how", ["using_adapter", "merged"])
def test_switching_leaves_everything_as_it_was(make_roles: Callable, how: str) -> None:
    roles: Roles = make_roles()
    switch = getattr(roles, how)
    flags = {name: p.requires_grad for name, p in roles.named_parameters()}
    assert 0 < sum(flags.values()) < len(flags)
    with roles.using_adapter("value"):
        before = state(roles)
        for role in [*ROLES, "reference"]:
            with switch(role), roles.using_adapter("reference"), roles.using_adapter("reward"):
                assert flags == {name: p.requires_grad for name, p in roles.named_parameters()}
            assert state(roles) == before
        with pytest.raises(RuntimeError, match="inside"), switch("policy"):
            raise RuntimeError("inside")
        assert state(roles) == before
    assert flags == {name: p.requires_grad for name, p in roles.named_parameters()}


def test_a_reference_pass_freezes_no_parameter(make_roles: Callable, make_texts: Callable) -> None:
    roles, batch = make_roles(), make_texts(3, seed=0)
    with torch.no_grad():
        roles.hidden("reference", batch)
    roles.hidden("policy", batch).sum().backward()
    with torch.no_grad():
        roles.hidden("reference", batch)
    roles.heads["value"](roles.hidden("value", batch)).sum().backward()
    for name in ("policy", "value"):
        assert all(
            p.grad is not None and p.grad.abs().max() > 0 for p in roles.adapter_parameters("base", name).values()
        )
    trained = {id(p) for name in ("policy", "value") for p in roles.adapter_parameters("base", name).values()}
    trained.add(id(roles.heads["value"].weight))
    assert all(p.grad is None for p in roles.parameters() if id(p) not in trained)


def test_a_switch_costs_little(make_roles: Callable) -> None:
    roles = make_roles(layers=30)
    assert len(roles._layers["base"]) == 120
    best = float("inf")
    for _ in range(20):
        started = time.process_time()
        with roles.using_adapter("policy"):
            pass
        best = min(best, time.process_time() - started)
    assert best < 2e-3


# -- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", [*ROLES, "reference"])
def test_merged_and_copied_match_acting(make_roles: Callable, make_texts: Callable, kind: str, role: str) -> None:
    roles, batch = make_roles(kind), make_texts(4, seed=0)
    expected = logits_of(roles, role, batch)
    with torch.no_grad(), roles.merged(role) as model:
        torch.testing.assert_close(model(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
    before = bits(roles)
    copied = roles.copy_trunk(role)
    assert not any(".lora_" in name for name, _ in copied.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(copied(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
        for parameter in copied.parameters():
            parameter.zero_()
    assert_same(before, roles)  # the copy shares no memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_and_unmerging_does_not_drift(make_roles: Callable, dtype: torch.dtype) -> None:
    roles: Roles = make_roles()
    trunk = roles.trunk("policy")
    for name, parameter in trunk.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    before, storage = bits(roles), {name: p.data_ptr() for name, p in roles.named_parameters()}
    changed = trunk.model.layers[0].self_attn.q_proj.base_layer.weight
    for cycle in range(100):
        with roles.merged(ROLES[cycle % 3]):
            assert not torch.equal(changed, before["trunks.base.model.layers.0.self_attn.q_proj.base_layer.weight"])
    with pytest.raises(KeyboardInterrupt), roles.merged("policy"):
        raise KeyboardInterrupt
    assert_same(before, roles)
    assert storage == {name: p.data_ptr() for name, p in roles.named_parameters()}


# -- new adapters -----------------------------------------------------------------------------------------------------


def test_no_matching_module_is_an_error(make_model: Callable, make_lora: Callable) -> None:
    with pytest.raises(ValueError, match="q_proj"):
        Roles(make_model("neox")).add_adapter("base", "policy", make_lora("llama"))


def test_a_new_adapter_is_a_no_op_in_float32(make_model: Callable, make_lora: Callable, make_texts: Callable) -> None:
    roles, batch = Roles(make_model().bfloat16()), make_texts(3, seed=0)
    roles.add_adapter("base", "policy", make_lora())
    roles.table["policy"] = Role("base", "policy")
    assert {p.dtype for p in roles.adapter_parameters("base", "policy").values()} == {torch.float32}
    assert torch.equal(logits_of(roles, "policy", batch), logits_of(roles, "reference", batch))
