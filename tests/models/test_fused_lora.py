"""Fused LoRA layers, activation checkpointing and scoring with merged adapters, each against the plain computation."""

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_values_and_gradients_equal_pefts(shape: tuple, needs_input: bool, dropout: float) -> None:
    peft, ours = layer(lora_dropout=dropout)
    assert type(peft) is Linear
    assert type(ours) is FusedLinear
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs = [x.clone().requires_grad_(needs_input) for _ in range(2)]
    outputs = []
    for module, part in zip((peft, ours), inputs, strict=True):
        torch.manual_seed(5)  # of the dropout masks
        outputs.append(module(part))
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

    def seeded(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dropout: float) -> torch.Tensor:
        torch.manual_seed(0)
        return _FusedLora.apply(x, w, None, a, b, 1.7, dropout)

    for dropout in (0.0, 0.4):
        assert torch.autograd.gradcheck(partial(seeded, dropout=dropout), (x, a, b))


def passes(module: nn.Module, x: torch.Tensor, dtype: torch.dtype, checkpointed: bool = False) -> list[torch.Tensor]:
    """Run forward under autocast and backward: the output and the gradients of x, A and B."""
    module.train()
    module.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        output = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
    (output * torch.arange(output.numel()).view_as(output).cos().to(output.dtype)).sum().backward()
    gradient, x.grad = x.grad, None
    return [output.detach(), gradient, module.lora_A["one"].weight.grad, module.lora_B["one"].weight.grad]


@pytest.mark.parametrize("arriving", ["as the base", "float32"])  # the latter: from a layer norm under autocast
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_exact_as_peft(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dropout: float, arriving: str
) -> None:
    """Against the same weights and inputs in float64."""
    peft, ours = layer(lora_dropout=dropout)
    with torch.no_grad():
        for module in (peft, ours):
            module.base_layer.to(dtype)
    truth = copy.deepcopy(peft).double()
    x = torch.randn(3, 50, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    if arriving == "float32":
        x = x.float()
    exact = passes(truth, x.double().requires_grad_(), torch.float64)
    theirs = passes(peft, x.clone().requires_grad_(), dtype)
    monkeypatch.setattr(Linear, "forward", None)  # calling peft's own code fails the test
    mine = passes(ours, x.clone().requires_grad_(), dtype)

    rounding = torch.finfo(dtype).eps
    assert [part.dtype for part in mine] == [dtype, x.dtype, torch.float32, torch.float32]
    for here, there, right in zip(mine, theirs, exact, strict=True):
        errors = [((part.double() - right).norm() / right.norm()).item() for part in (here, there)]
        assert 0 < errors[0] <= min(1.05 * errors[1] + rounding / 20, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recomputed_pass_has_the_same_dropout_mask(dtype: torch.dtype) -> None:
    _, ours = layer(lora_dropout=0.5)
    ours.base_layer.to(dtype)
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    plain = passes(ours, x, dtype)
    again = passes(ours, x, dtype, checkpointed=True)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(8)
    assert not torch.equal(ours(x), plain[0])


class Operations(TorchDispatchMode):
    """Counts operations that read or write memory (views and new tensors do not), and what they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in str(function):
            self.count += 1
            self.bytes += sum(part.nbytes for part in (*args, result) if isinstance(part, torch.Tensor))
        return result


@pytest.mark.parametrize(("dropout", "kernels", "share"), [(0.0, (20, 12), 0.45), (0.1, (24, 15), 0.45)])
def test_it_has_fewer_kernels_and_less_memory_traffic(dropout: float, kernels: tuple[int, int], share: float) -> None:
    x = torch.randn(4096, 12, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.ones(4096, 20, dtype=torch.bfloat16)
    measured = []
    for module in layer(lora_dropout=dropout, r=1):
        module.base_layer.to(torch.bfloat16)
        module.base_layer.bias = None
        with Operations() as operations:
            with torch.autocast("cpu", torch.bfloat16):
                output = module.train()(x)
            output.backward(gradient)
        measured.append(operations)
        x.grad = None  # the next pass would add to it
    assert tuple(operations.count for operations in measured) == kernels
    assert measured[1].bytes / measured[0].bytes < share


@pytest.mark.parametrize("case", ["all dropped", "dora", "bfloat16", "autocast", "trained base", "switched off"])
def test_unusual_layers_are_left_to_peft(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    peft, ours = layer(**{"all dropped": {"lora_dropout": 1.0}, "dora": {"use_dora": True}}.get(case, {}))
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
