"""Unpadded batches give the results of each sequence alone, and only with models that keep sequences apart."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.models import unpadded
from rlhf.models.last_block import WORTHWHILE
from rlhf.models.sequences import Sequences, filled, pack, spans
from tests.helpers.small_models import small


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied", "neox"])
def test_states_and_gradients_are_those_of_padded_rows(
    make_roles: Callable, make_texts: Callable, kind: str, packed: bool, checkpointed: bool
) -> None:
    batch = make_texts(9, seed=1)
    batch = pack(batch, 48) if packed else batch
    assert int(batch.predicting.sum()) < WORTHWHILE * int(batch.lengths.sum())  # a part of the last block is left out
    roles, results = make_roles(kind).double(), []
    if checkpointed:
        roles.checkpoint_activations()
        roles.train()
    assert roles.unpadded
    for row_modules in (roles._unpadded["base"], None):
        roles._unpadded["base"] = row_modules
        states = roles.states("policy", batch, batch.predicting)
        values = roles.states("value", batch, batch.predicting)
        (states.sin().sum() + values.square().sum()).backward()
        gradients = {name: p.grad for name, p in roles.named_parameters() if p.grad is not None}
        results.append({"states": states, "values": values, **gradients})
        roles.zero_grad()
    ours, padded = results
    assert len(ours) > 10
    assert ours.keys() == padded.keys()
    for name, value in padded.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_unpadded_batches_agree_under_autocast(make_roles: Callable, make_texts: Callable, base: torch.dtype) -> None:
    roles, batch = make_roles().to(base), make_texts(9, seed=1)
    roles.compute_dtype = torch.bfloat16
    assert roles.unpadded
    with torch.no_grad():
        ours = roles.states("policy", batch, batch.predicting)
        padded = roles.hidden("policy", batch)[batch.predicting]
    assert ours.dtype == padded.dtype
    torch.testing.assert_close(ours, padded, rtol=0.1, atol=0.1)


def test_the_last_token_is_scored(make_roles: Callable, make_texts: Callable) -> None:
    roles, batch = make_roles(), make_texts(7, seed=3)
    with torch.no_grad():
        scores = roles.last_token_scores("reward", batch)
        for i, length in enumerate(batch.lengths.tolist()):
            row = batch.rows(torch.tensor([i]))
            alone = roles.heads["reward"](roles.hidden("reward", row)[0, length - 1])
            torch.testing.assert_close(scores[i], alone, rtol=1e-4, atol=1e-5)


def test_frozen_passes_are_larger_on_a_gpu(make_roles: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    roles, lengths = make_roles(), [5, 2, 5] * 7
    assert roles.groups(lengths, 10, frozen=True) == roles.groups(lengths, 10)
    monkeypatch.setattr(type(roles), "device", torch.device("cuda"))
    sizes = [sum(lengths[row] for row in group) for group in roles.groups(lengths, 10, frozen=True)]
    assert sizes[0] > 70
    assert max(sizes) <= 80
    assert roles.groups(lengths, 10)[0] == [0, 1]


def test_nothing_is_computed_on_padding(make_roles: Callable, make_texts: Callable) -> None:
    roles, batch, seen = make_roles(), make_texts(9, seed=1), []
    assert roles.unpadded
    base = roles.trunk("policy").base_model
    base.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    roles.states("policy", batch, batch.predicting)
    even = Sequences.from_lists([[3, 4], [5, 6]], [[7, 8], [9, 10]])
    roles.states("policy", even, even.predicting)
    assert seen == [(1, int(batch.lengths.sum())), (1, 8)]
    assert int(batch.lengths.sum()) < batch.ids.numel()
    assert roles.groups([5, 2, 5], 10) == [[0, 1], [2]]  # in their order: rows of similar length need not be found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gpt_neox", {}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
        ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
        ("phi", {}),
        ("gpt2", {}),
    ],
)
def test_models_that_keep_sequences_apart_run_so(kind: str, options: dict) -> None:
    model = small(kind, **options)
    assert unpadded.allow(model)
    assert unpadded.allow(model)
    texts = [[3, 4, 5], [6, 7, 8, 9, 10], [11]]
    batch = Sequences.from_lists([text[:1] for text in texts], [text[1:] for text in texts])
    everything = spans(torch.zeros_like(batch.lengths), batch.lengths, batch.ids.shape[1])
    with torch.no_grad():
        together = unpadded.hidden_states(model, batch, everything)
        alone = [model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"num_key_value_heads": 2, "sliding_window": 64}),
        ("mamba", {"state_size": 4}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_other_models_keep_their_attention(kind: str, options: dict) -> None:
    model = small(kind, **options)
    before = model.config._attn_implementation
    assert not unpadded.allow(model)
    assert model.config._attn_implementation == before


def test_a_model_that_loses_the_lengths_on_the_way_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, bounds=None, **options: forward(*args, **options))
    assert not unpadded.allow(model)
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


def test_eager_attention_is_left_alone(make_roles: Callable) -> None:
    roles = make_roles(attn_implementation="eager")
    assert not roles.unpadded
    assert roles.trunk("policy").config._attn_implementation == "eager"


def test_the_trial_does_not_change_dropout(make_roles: Callable) -> None:
    roles = make_roles(dropout=0.5)
    trained = [module for name, module in roles.named_modules() if "lora_dropout.policy" in name]
    for module in trained:
        module.train()
    assert roles.unpadded
    assert len(trained) > 4
    assert all(module.training for module in trained)
    assert not roles.trunk("policy").training


def test_generate_masks_its_padding_as_before() -> None:
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    options = {"attention_mask": (ids > 0).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def answers(model: PreTrainedModel) -> Tensor:
        return model.generate(ids, **options)

    plain, allowed = small("llama"), small("llama")
    assert unpadded.allow(allowed)
    assert torch.equal(answers(plain), answers(allowed))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 60))
def test_filled_groups_keep_order_and_budget(lengths: list[int], budget: int) -> None:
    groups = list(filled(lengths, budget))
    assert [row for group in groups for row in group] == list(range(len(lengths)))
    for group, following in zip(groups, [*groups[1:], []], strict=True):
        total = sum(lengths[row] for row in group)
        assert total <= budget or len(group) == 1
        assert not following or total + lengths[following[0]] > budget
