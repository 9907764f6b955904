"""Batches, packing and heads: which token is predicted where; padding, packing and chunking change nothing."""

import itertools
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlhf.models import heads
from rlhf.models.heads import ScalarHead, token_stats
from rlhf.models.sequences import PER_GROUP, Sequences, concatenate, length_buckets, pack, spans, unflatten

lists = st.lists(
    st.tuples(
        st.lists(st.integers(3, 49), min_size=1, max_size=6),
        st.lists(st.integers(3, 49), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=5,
)


def build(rows: list[tuple[list[int], list[int]]], whole_text: bool = False) -> Sequences:
    return Sequences.from_lists([p for p, _ in rows], [r for _, r in rows], whole_text)


# -- alignment -------------------------------------------------------------------------------------------------------


@given(lists, st.booleans())
def test_targets_are_aligned_as_in_a_plain_loop(rows: list[tuple[list[int], list[int]]], whole_text: bool) -> None:
    batch = build(rows, whole_text)
    positions, targets = [], []
    for i, (prompt, response) in enumerate(rows):
        text = prompt + response
        assert batch.ids[i, : len(text)].tolist() == text
        for t in range(1 if whole_text else len(prompt), len(text)):
            positions.append((i, t - 1))
            targets.append(text[t])
    assert [tuple(place) for place in batch.predicting.nonzero().tolist()] == positions
    assert batch.target_ids.tolist() == targets
    assert int(batch.targets_predicted.sum()) == len(targets)


def test_a_first_token_is_never_a_target() -> None:
    batch = build([([], [5, 6, 7]), ([8], [9])])
    assert batch.target_ids.tolist() == [6, 7, 9]
    assert int(batch.predicting.sum()) == 3


@given(lists)
def test_response_mask_and_unflatten_round_trip(rows: list[tuple[list[int], list[int]]]) -> None:
    batch = build(rows)
    table = unflatten(batch.target_ids.float(), batch.response_mask)
    for i, (_, response) in enumerate(rows):
        assert table[i].tolist() == response + [0.0] * (table.shape[1] - len(response))
    assert torch.equal(table[batch.response_mask], batch.target_ids.float())


@given(lists, st.data())
def test_rows_are_cut_to_the_longest(rows: list[tuple[list[int], list[int]]], data: st.DataObject) -> None:
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
    part, expected = build(rows).rows(torch.tensor(index)), build([rows[i] for i in index])
    assert torch.equal(part.ids, expected.ids)
    assert torch.equal(part.targets, expected.targets)
    assert torch.equal(part.lengths, expected.lengths)


def test_spans_agree_with_hand_computation() -> None:
    expected = [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert spans(torch.tensor([1, 2, 0]), torch.tensor([3, 2, 4]), 4).int().tolist() == expected


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 80))
def test_length_buckets_cover_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = list(length_buckets(lengths, budget))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    for before, after in pairwise(groups):
        assert lengths[before[-1]] >= lengths[after[0]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 200))
def test_no_other_buckets_pad_less(lengths: list[int], budget: int) -> None:
    """The result is the best of all ways to cut the sorted rows."""

    def cost(groups: list[list[int]]) -> float:
        return sum(len(group) * max(group) + budget / PER_GROUP for group in groups)

    descending, cheapest = sorted(lengths, reverse=True), math.inf
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        groups = [descending[start:end] for start, end in pairwise(places)]
        if all(len(group) == 1 or len(group) * group[0] <= budget for group in groups):
            cheapest = min(cheapest, cost(groups))
    chosen = [[lengths[row] for row in group] for group in length_buckets(lengths, budget)]
    assert cost(chosen) == pytest.approx(cheapest)


def test_concatenate_undoes_a_grouping() -> None:
    x = torch.randn(5, 2)
    order = [3, 0, 4, 2, 1]
    assert torch.equal(concatenate([x[[3, 0]], x[[4, 2, 1]]], order), x)


# -- padding and packing change no log-prob --------------------------------------------------------------------------


def logprobs_alone(model: nn.Module, batch: Sequences) -> dict[tuple[int, ...], list[float]]:
    """Log-probs of each row's targets, from plain transformers on that row alone: text → log-probs."""
    result = {}
    for i, length in enumerate(batch.lengths.tolist()):
        text = batch.ids[i, :length]
        with torch.no_grad():
            table = model(input_ids=text[None]).logits[0].log_softmax(-1)
        targets = batch.targets_predicted[i, :length].nonzero().squeeze(1)
        result[tuple(text.tolist())] = [float(table[t - 1, text[t]]) for t in targets]
    return result


def logprobs_of(roles: object, batch: Sequences) -> Tensor:
    with torch.no_grad():
        hidden = roles.hidden("reference", batch)  # type: ignore[attr-defined]
        return roles.token_stats("reference", hidden[batch.predicting], batch.target_ids).logprobs  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["llama", "tied", "neox"])
def test_padding_and_other_rows_change_no_logprob(
    make_model: Callable, make_roles: Callable, make_texts: Callable, kind: str
) -> None:
    roles, batch = make_roles(kind), make_texts(9, seed=1)
    alone = [x for row in logprobs_alone(make_model(kind), batch).values() for x in row]
    torch.testing.assert_close(logprobs_of(roles, batch), torch.tensor(alone), rtol=1e-5, atol=1e-5)
    batch.ids[~spans(torch.zeros_like(batch.lengths), batch.lengths, batch.ids.shape[1])] = 7  # different padding
    torch.testing.assert_close(logprobs_of(roles, batch), torch.tensor(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["llama", "tied", "neox"])
@pytest.mark.parametrize("whole_text", [False, True])
def test_packing_changes_no_logprob(
    make_model: Callable, make_roles: Callable, make_texts: Callable, kind: str, training: bool, whole_text: bool
) -> None:
    roles, batch = make_roles(kind).train(training), make_texts(11, seed=2)
    if whole_text:
        batch.targets = spans(torch.zeros_like(batch.lengths), batch.lengths, batch.ids.shape[1])
    packed = pack(batch, 48)
    assert len(packed) < len(batch) / 2
    assert int(packed.lengths.max()) <= 48
    expected = logprobs_alone(make_model(kind), batch)
    # walk the packed rows from restart to restart, in the order of token_stats
    got, seen = logprobs_of(roles, packed).tolist(), 0
    assert packed.position_ids is not None
    for i, length in enumerate(packed.lengths.tolist()):
        starts = (packed.position_ids[i, :length] == 0).nonzero().squeeze(1).tolist()
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            numbers = expected.pop(tuple(packed.ids[i, start:end].tolist()))
            assert got[: len(numbers)] == pytest.approx(numbers, abs=1e-5)
            got, seen = got[len(numbers) :], seen + len(numbers)
    assert not expected
    assert not got
    assert seen == int(batch.targets_predicted.sum())


@given(lists, st.integers(1, 40))
def test_pack_keeps_every_token_once(rows: list[tuple[list[int], list[int]]], width: int) -> None:
    batch = build(rows)
    packed = pack(batch, width)
    assert int(packed.lengths.sum()) == int(batch.lengths.sum())
    assert sorted(packed.target_ids.tolist()) == sorted(batch.target_ids.tolist())
    assert int(packed.predicting.sum()) == int(packed.targets_predicted.sum())
    assert int(packed.lengths.max()) <= max(width, int(batch.lengths.max()))


# -- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize(
    "elements", [2**24, 50, 7 * 50, 10]
)  # one chunk, one token per chunk, 7 tokens with a remainder, less than one token
def test_token_stats_is_a_plain_log_softmax(monkeypatch: pytest.MonkeyPatch, temperature: float, elements: int) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    output, targets = nn.Linear(16, 50), torch.randint(50, (23,))
    hidden = torch.randn(23, 16, requires_grad=True)
    weights = torch.randn(23)

    table = (output(hidden) / temperature).log_softmax(-1)
    expected = table[torch.arange(23), targets]
    wanted = torch.autograd.grad((expected * weights).sum(), [hidden, *output.parameters()])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            stats = token_stats(hidden, output, targets, temperature, entropy=True)
        torch.testing.assert_close(stats.logprobs, expected)
        entropy = torch.distributions.Categorical(logits=table).entropy()
        torch.testing.assert_close(stats.entropy, entropy, rtol=1e-5, atol=1e-5)
        assert not stats.entropy.requires_grad
        assert stats.logprobs.requires_grad == grad
    stats = token_stats(hidden, output, targets, temperature, entropy=True)
    got = torch.autograd.grad((stats.logprobs * weights).sum(), [hidden, *output.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scalar_head_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    head, hidden = ScalarHead(33, zero=False), torch.randn(4, 5, 33)
    exact = hidden.double() @ head.weight.double().squeeze(0)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(hidden)
    assert got.dtype == torch.float32
    assert got.shape == (4, 5)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    assert head(hidden.bfloat16()).dtype == torch.float32


def test_a_scalar_head_starts_at_zero_or_with_a_small_deviation() -> None:
    torch.manual_seed(0)
    assert ScalarHead(64, zero=True).weight.abs().max() == 0
    weights = ScalarHead(4096, zero=False).weight
    assert float(weights.std().detach()) == pytest.approx(4097**-0.5, rel=0.05)
