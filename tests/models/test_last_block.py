"""The last block computes states where they are read, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.models import isolated_attention, unpadded
from rlhf.models.sequences import Sequences, spans
from tests.helpers.small_models import small


def allowed(kind: str, **options: object) -> PreTrainedModel:
    model = small(kind, **options)
    assert unpadded.allow(model)
    return model


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("llama", {}, {"self_attn.q_proj", "self_attn.o_proj", "mlp"}),
        ("gpt_neox", {}, {"attention.dense", "mlp"}),
        ("gpt2", {}, {"attn.c_proj", "mlp"}),
        ("phi", {}, {"self_attn.q_proj", "self_attn.dense", "mlp"}),
        ("qwen3", {"head_dim": 8, "num_key_value_heads": 2}, {"self_attn.q_proj", "self_attn.o_proj", "mlp"}),
    ],
)
def test_architectures_name_these_modules_and_read_the_same_states(kind: str, options: dict, names: set[str]) -> None:
    model = allowed(kind, **options)
    paths = unpadded.agreeing_row_modules(model)
    assert {path.partition(".1.")[2] for path in paths} == names
    batch = Sequences.from_lists([[3, 4, 5], [6, 7], [8]], [[9, 10], [11, 12, 13], [14]])
    last = spans(batch.lengths - 1, batch.lengths, batch.ids.shape[1])
    with torch.no_grad():
        alone = unpadded.hidden_states(model, batch, last, paths)
        torch.testing.assert_close(alone, unpadded.hidden_states(model, batch, last), rtol=1e-5, atol=1e-5)


def rows_seen(module: torch.nn.Module) -> list[int]:
    """The numbers of tokens that a module is given from now on."""
    seen: list[int] = []
    forward = module.forward

    def watched(states: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(states.shape[1])
        return forward(states, *args, **options)

    module.forward = watched
    return seen


def test_only_the_last_block_and_only_if_few_states_are_read(make_roles: Callable, make_texts: Callable) -> None:
    roles, batch = make_roles(), make_texts(9, seed=1)
    first, last = (rows_seen(roles.trunk("policy").model.layers[index].mlp) for index in (0, -1))
    assert roles.unpadded
    first.clear(), last.clear()
    tokens, read = int(batch.lengths.sum()), int(batch.predicting.sum())
    roles.states("policy", batch, batch.predicting)
    roles.last_token_scores("reward", batch)
    roles.states("policy", batch, spans(torch.zeros_like(batch.lengths), batch.lengths, batch.ids.shape[1]))
    assert first == [tokens] * 3
    assert last == [read, len(batch), tokens]


def test_recomputed_blocks_are_left_whole(make_roles: Callable, make_texts: Callable) -> None:
    roles, batch = make_roles(), make_texts(9, seed=1)
    assert roles.unpadded
    roles.checkpoint_activations()
    seen = rows_seen(roles.trunk("policy").model.layers[-1].mlp)
    roles.train()
    roles.last_token_scores("reward", batch).sum().backward()
    assert set(seen[-2:]) == {int(batch.lengths.sum())}


def test_a_module_that_mixes_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = allowed("llama")
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda states: forward(states) + states.mean(1, keepdim=True))
    assert unpadded.agreeing_row_modules(model) == []
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks


def test_a_module_that_returns_more_than_states_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = allowed("llama")
    mlp = model.model.layers[-1].mlp
    forward = mlp.forward

    class Pair(tuple):
        def __add__(self, other: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self[0] + other

        __radd__ = __add__

    monkeypatch.setattr(mlp, "forward", lambda states: Pair((forward(states), None)))
    assert unpadded.agreeing_row_modules(model) == []


def test_sequences_of_equal_length_lie_side_by_side(make_roles: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    roles, runs = make_roles(), []
    assert roles.unpadded
    found = isolated_attention._runs
    monkeypatch.setattr(isolated_attention, "_runs", lambda bounds: runs.append(found(bounds)) or runs[-1])
    batch = Sequences.from_lists([[3], [4, 5], [6], [7, 8]], [[9, 10], [11], [12, 13], [14]])
    longer = Sequences.from_lists([[3], [4, 5], [6], [7, 8]], [[9, 10], [11, 9], [12, 13], [14, 9]])
    for each in (batch, longer):
        states = roles.states("policy", each, each.predicting)
        alone = [roles.hidden("policy", each.rows(torch.tensor([row])))[0] for row in range(4)]
        expected = torch.cat([own[each.predicting[row, : len(own)]] for row, own in enumerate(alone)])
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)  # in the order of the rows all the same
    assert runs[0] == [(4, 3)]
    assert runs[-1] == [(2, 3), (2, 4)]
