"""Grouped-query attention in decoding: without copies, and with the values of sdpa on repeated keys and values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from rlhf.models.roles import Roles
from rlhf.rollout import attention as module
from rlhf.rollout.attention import GROUPED, attention, grouped_attention
from rlhf.rollout.native import NativeEngine
from tests.helpers.rollouts import EOS, generate, response_rows
from tests.helpers.tiny_architectures import tiny_architecture

SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(9, 3), (4, 1), (4, 4)])
def test_values_are_those_of_repeated_keys_and_values(heads: int, shared: int, additive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(5, count, time, width, generator=generator)
        for count, time, width in ((heads, 1, 16), (shared, 30, 16), (shared, 30, 8))
    )
    visible = torch.rand(5, 1, 1, 30, generator=generator) < 0.6
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf) if additive else visible
    # As the cache returns them: a part of a longer buffer.
    found, none = attention(torch.nn.Identity(), query, key[:, :, :25], value[:, :, :25], mask[..., :25], scaling=0.3)
    repeated = (repeat_kv(x[:, :, :25], heads // shared) for x in (key, value))
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=visible[..., :25], scale=0.3)
    assert none is None
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_several_tokens_per_row_are_refused() -> None:
    states: Any = [torch.randn(1, heads, 2, 8) for heads in (4, 2, 2)]
    with pytest.raises(AssertionError, match="several tokens"):
        attention(torch.nn.Identity(), *states, torch.ones(1, 1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("fixed", [False, True])
def test_models_with_shared_keys_decode_with_it(monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    """Tokens are those of transformers' own attention, and the model's attention is the same before and after."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        roles = Roles(tiny_architecture("llama", **SHARED))
    config, calls = roles.trunk("reference").config, list[Any]()
    before = config._attn_implementation

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args[1].shape)
        return scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr(module, "scaled_dot_product_attention", counted)
    found = generate(NativeEngine(EOS, fixed=fixed), roles, role="reference")
    assert calls
    assert config._attn_implementation == before
    calls.clear()
    monkeypatch.setattr("rlhf.rollout.native.grouped_attention", lambda model: torch.no_grad())
    assert response_rows(generate(NativeEngine(EOS, fixed=fixed), roles, role="reference")) == response_rows(found)
    assert not calls


def test_models_without_shared_keys_and_failures_leave_the_attention(make_roles: Callable) -> None:
    own = tiny_architecture("llama", **SHARED | {"num_key_value_heads": 4})
    with grouped_attention(own):
        assert own.config._attn_implementation == "sdpa"
    shared = tiny_architecture("llama", **SHARED)
    seen: list[str] = []

    def fail() -> None:
        with grouped_attention(shared):
            seen.append(shared.config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [GROUPED]
    assert shared.config._attn_implementation == "sdpa"
