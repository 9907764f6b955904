"""Fused LoRA layers, activation checkpointing and scoring with merged adapters, each against the plain computation."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn

from rlhf.models.fused_lora import FusedLinear, _FusedLora, fuse
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from tests.helpers.ppo_stages import LORA, make_ppo, ppo_settings

BATCH = Sequences.from_lists([[3, 4, 5], [6, 7]], [[8, 9, 10], [11, 12, 13, 14, 15]])


def layer(**options: Any) -> tuple[nn.Module, nn.Module]:
    """The same adapted linear layer twice: peft's and the fused one."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.ModuleDict({"linear": nn.Linear(12, 20, bias=True)})
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 12, "target_modules": ["linear"], "init_lora_weights": False, **options}
        )
        inject_adapter_in_model(config, model, adapter_name="one")
        model["linear"].base_layer.requires_grad_(False)
        made.append(model)
    fuse(made[1])
    return made[0]["linear"], made[1]["linear"]


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_values_and_gradients_equal_pefts(shape: tuple, needs_input: bool) -> None:
    peft, ours = layer()
    assert type(peft) is Linear
    assert type(ours) is FusedLinear
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_(needs_input) for _ in range(2)]
    outputs = [module(part) for module, part in zip((peft, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    for theirs, mine in zip(peft.parameters(), ours.parameters(), strict=True):
        assert (theirs.grad is None) == (mine.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    if needs_input:
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (4, 3), (2, 3), (4, 2))
    )
    for part in (x, a, b):
        part.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x, a, b: _FusedLora.apply(x, w, None, a, b, 1.7), (x, a, b))


@pytest.mark.parametrize("case", ["dropout", "dora", "bfloat16", "autocast", "trained base", "switched off"])
def test_unusual_layers_are_left_to_peft(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    peft, ours = layer(**{"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(case, {}))
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    if case == "bfloat16":
        x = x.bfloat16()
        for module in (peft, ours):
            module.base_layer.bfloat16()
    for module in (peft, ours):
        module.base_layer.weight.requires_grad_(case == "trained base")
        if case == "switched off":
            module._disable_adapters = True
    monkeypatch.setattr(_FusedLora, "apply", None)  # calling it fails the test
    results = []
    for module in (peft, ours):
        torch.manual_seed(5)
        with torch.autocast("cpu", enabled=case == "autocast"):
            results.append(module(x))
    assert torch.equal(results[0], results[1])


def ppo_gradients(roles: Roles) -> dict[str, torch.Tensor]:
    roles.zero_grad()
    roles.train()
    policy = roles.hidden("policy", BATCH)[BATCH.predicting]
    value = roles.hidden("value", BATCH)[BATCH.predicting]
    torch.manual_seed(0)
    roles.heads["value"].weight.data.normal_()
    loss = roles.token_stats("policy", policy, BATCH.target_ids).logprobs.sum() + roles.heads["value"](value).sum()
    loss.backward()
    roles.eval()
    return {name: p.grad.clone() for name, p in roles.named_parameters() if p.grad is not None}


def test_checkpointed_activations_are_those_of_their_adapter(folders: SimpleNamespace, tmp_path: Any) -> None:
    """The backward pass runs after both role switches: it must recompute with the role's adapter, not the base."""
    roles = make_ppo(ppo_settings(lora=LORA), folders, tmp_path / "samples").roles
    plain = ppo_gradients(roles)
    roles.checkpoint_activations()
    again = ppo_gradients(roles)
    assert plain.keys() == again.keys()
    assert any(".policy." in name for name in plain)
    assert any(".value." in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", ["value", "reward", "policy"])
def test_scoring_is_the_same_function_and_leaves_no_trace(folders: SimpleNamespace, tmp_path: Any, role: str) -> None:
    roles = make_ppo(ppo_settings(), folders, tmp_path / "samples").roles
    before = {name: value.clone() for name, value in roles.state_dict().items()}
    table = dict(roles.table)
    with torch.no_grad():
        expected = roles.hidden(role, BATCH)
        base = roles.hidden("reference", BATCH)
        with roles.scoring(role):
            assert roles.table[role].adapter is None
            torch.testing.assert_close(roles.hidden(role, BATCH), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base, rtol=1e-2, atol=1e-2)
    assert roles.table == table
    assert all(torch.equal(before[name], value) for name, value in roles.state_dict().items())
    with roles.scoring(role):  # gradients are needed, so that nothing is merged
        assert roles.table == table
