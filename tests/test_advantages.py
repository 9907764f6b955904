"""Advantages against hand-computed numbers, published definitions, and the exact gradient of a toy policy."""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf import advantages, ppo
from rlhf.advantages import RewardedBatch

LENGTHS = [2, 3, 1, 3, 2, 2]
SCORES = [1.0, 4.0, -2.0, 0.5, 0.5, 3.5]
PENALTY = torch.tensor(
    [[0.1, -0.2, 9], [0.3, 0.1, 0.2], [-0.5, 9, 9], [0.0, 0.4, -0.1], [0.2, 0.2, 9], [0.7, 0.0, 9]], dtype=torch.double
)
COEF = 0.5
MASK = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
# two prompts with three answers each
BATCH = RewardedBatch(
    ppo.shape_rewards(torch.tensor(SCORES, dtype=torch.double), PENALTY, MASK, COEF), MASK, torch.arange(6) // 3
)
# score − ½ Σ penalty
RETURNS = [1.0 + 0.05, 4.0 - 0.3, -2.0 + 0.25, 0.5 - 0.15, 0.5 - 0.2, 3.5 - 0.35]


def of_rows(numbers: list[float]) -> Tensor:
    """A number for each row, at each of its tokens."""
    return torch.where(MASK, torch.tensor(numbers, dtype=torch.double)[:, None], 0.0)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_rloo_agrees_with_hand_computation() -> None:
    # returns 1.05, 3.7, −1.75 and .35, .3, 3.15: each less the mean of the other two
    expected = [1.05 - 0.975, 3.7 + 0.35, -1.75 - 2.375, 0.35 - 1.725, 0.3 - 1.75, 3.15 - 0.325]
    torch.testing.assert_close(advantages.rloo(BATCH), of_rows(expected))


def test_grpo_agrees_with_hand_computation() -> None:
    # means 1 and 3.8 / 3; squared deviations .0025 + 7.29 + 7.5625 = 14.855, so that the sample's deviation is √7.4275
    centred = [0.05, 2.7, -2.75, 0.35 - 3.8 / 3, 0.3 - 3.8 / 3, 3.15 - 3.8 / 3]
    torch.testing.assert_close(advantages.grpo(BATCH, divide_by_std=False), of_rows(centred))
    found = advantages.grpo(BATCH)
    torch.testing.assert_close(found[:3], of_rows([x / (7.4275**0.5 + 1e-4) for x in centred])[:3])


def test_the_reward_to_go_agrees_with_hand_computation() -> None:
    batch = replace(BATCH, gamma=0.5)
    # rewards of row 1: −.15, −.05, 3.9
    torch.testing.assert_close(advantages.reward_to_go(BATCH)[1], torch.tensor([3.7, 3.85, 3.9], dtype=torch.double))
    torch.testing.assert_close(
        advantages.reward_to_go(batch)[1], torch.tensor([-0.15 + 0.95, 1.9, 3.9], dtype=torch.double)
    )
    # rewards of row 0: −.05, 1.1; the greedy answer has 2
    greedy = replace(BATCH, greedy_scores=torch.full((6,), 2.0, dtype=torch.double))
    torch.testing.assert_close(advantages.remax(greedy)[0], torch.tensor([1.05 - 2, 1.1 - 2, 0], dtype=torch.double))


def test_gae_is_that_of_ppo() -> None:
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    batch = replace(BATCH, gamma=0.9, lam=0.8, values=values)
    assert torch.equal(advantages.gae(batch), ppo.gae(BATCH.rewards, values, MASK, 0.9, 0.8)[0])


@pytest.mark.parametrize("function", [advantages.rloo, advantages.grpo])
def test_a_prompt_with_a_single_answer_is_an_error(function: Callable) -> None:
    with pytest.raises(ValueError, match="a single answer"):
        function(replace(BATCH, prompts=torch.tensor([0, 0, 0, 1, 1, 2])))


# -- published definitions, worked out row by row ------------------------------------------------------------------


def by_row(definition: Callable[[float, list[float]], float]) -> Tensor:
    """What a definition gives for each answer's return and those of its group."""
    return of_rows([definition(RETURNS[i], RETURNS[3 * (i // 3) : 3 * (i // 3) + 3]) for i in range(6)])


def test_rloo_is_what_trl_and_verl_define() -> None:
    # TRL: the sum of the group without the answer, over k − 1
    torch.testing.assert_close(advantages.rloo(BATCH), by_row(lambda r, group: r - (sum(group) - r) / 2))
    # verl: k / (k − 1) times the distance from the mean of the whole group
    torch.testing.assert_close(advantages.rloo(BATCH), by_row(lambda r, group: 1.5 * (r - statistics.fmean(group))))


def test_grpo_is_what_trl_and_verl_define() -> None:
    for epsilon, tolerance in ((1e-4, 1e-9), (1e-6, 1e-4)):  # TRL's, which is ours; verl's
        expected = by_row(lambda r, group: (r - statistics.fmean(group)) / (statistics.stdev(group) + epsilon))  # noqa: B023
        torch.testing.assert_close(advantages.grpo(BATCH), expected, rtol=tolerance, atol=0)


def test_reinforce_plus_plus_is_what_its_paper_and_verl_define() -> None:
    # A_t = score − β Σ_{i ≥ t} k1_i, then less the mean of the whole batch's tokens, over their standard deviation
    raw = [[SCORES[i] - COEF * float(PENALTY[i, t : LENGTHS[i]].sum()) for t in range(LENGTHS[i])] for i in range(6)]
    tokens = [x for row in raw for x in row]
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    found = ppo.whiten(advantages.reward_to_go(BATCH), MASK)
    expected = torch.tensor([(x - mean) / deviation for x in tokens], dtype=torch.double)
    torch.testing.assert_close(found[MASK], expected, rtol=1e-6, atol=1e-9)
    # verl divides by the deviation of a sample (n − 1): by a factor √(n / (n − 1)) less
    sample = torch.tensor([(x - mean) / statistics.stdev(tokens) for x in tokens], dtype=torch.double)
    torch.testing.assert_close(found[MASK] * (12 / 13) ** 0.5, sample, rtol=1e-6, atol=1e-9)


# -- properties --------------------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[RewardedBatch], Tensor]] = {
    name: getattr(advantages, name) for name in ("gae", "reward_to_go", "rloo", "grpo", "remax")
}


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 2**32), groups=st.integers(1, 3), answers=st.integers(2, 4))
def test_padding_and_the_order_of_rows_change_nothing(name: str, seed: int, groups: int, answers: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    rows = groups * answers
    mask = torch.arange(4) < torch.randint(1, 5, (rows, 1), generator=generator)
    prompts = torch.arange(rows) // answers
    tensors: dict[str, Any] = {"rewards": normal(rows, 4), "values": normal(rows, 4), "mask": mask, "prompts": prompts,
                               "greedy_scores": normal(groups)[prompts]}  # fmt: skip
    found = ALL[name](RewardedBatch(**tensors, gamma=0.9, lam=0.7))
    assert (found[~mask] == 0).all()
    other = {key: torch.where(mask, x, 1e9) if x.shape == mask.shape and key != "mask" else x
             for key, x in tensors.items()}  # fmt: skip
    assert torch.equal(ALL[name](RewardedBatch(**other, gamma=0.9, lam=0.7)), found)
    order = torch.randperm(rows, generator=generator)
    shuffled = RewardedBatch(**{key: x[order] for key, x in tensors.items()}, gamma=0.9, lam=0.7)
    torch.testing.assert_close(ALL[name](shuffled), found[order], rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 2**32), answers=st.integers(2, 6))
def test_a_groups_advantages_add_up_to_nothing(seed: int, answers: int) -> None:
    rewards = torch.randn(answers, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    batch = RewardedBatch(rewards, torch.ones(answers, 1, dtype=torch.bool), torch.zeros(answers, dtype=torch.long))
    for found in (advantages.rloo(batch), advantages.grpo(batch)):
        assert float(found.sum()) == pytest.approx(0, abs=1e-9)


# -- the expected gradient, by enumerating everything that can be sampled --------------------------------------------

TOKENS, TIME = 3, 2
SEQUENCES = torch.tensor(list(itertools.product(range(TOKENS), repeat=TIME)))  # [9, 2]
LOGITS = torch.randn(1 + TOKENS, TOKENS, generator=torch.Generator().manual_seed(0), dtype=torch.double)  # by context
REWARDS = torch.randn(len(SEQUENCES), TIME, generator=torch.Generator().manual_seed(1), dtype=torch.double)
GREEDY = torch.tensor([0.7], dtype=torch.double)  # whatever it is, it depends on the prompt alone


def token_logprobs(logits: Tensor) -> Tensor:
    """Of every sequence, [9, 2]: the second token depends on the first."""
    table = logits.log_softmax(-1)
    return torch.stack([table[0, SEQUENCES[:, 0]], table[1 + SEQUENCES[:, 0], SEQUENCES[:, 1]]], 1)


def expected_gradients(function: Callable[[RewardedBatch], Tensor], answers: int) -> tuple[Tensor, Tensor]:
    """E[mean over answers of Σ_t A_t ∇ log π] over all groups that can be sampled, and ∇ E[return].

    A reward depends on tokens up to its own alone, so that the first one of REWARDS is averaged over what follows it.
    """
    logits = LOGITS.clone().requires_grad_()
    logprobs = token_logprobs(logits)
    first = torch.stack([REWARDS[SEQUENCES[:, 0] == token, 0].mean() for token in range(TOKENS)])[SEQUENCES[:, 0]]
    rewards = torch.stack([first, REWARDS[:, 1]], 1)
    loss = torch.zeros((), dtype=torch.double)
    for group in itertools.product(range(len(SEQUENCES)), repeat=answers):
        rows = torch.tensor(group)
        batch = RewardedBatch(rewards[rows], torch.ones(answers, TIME, dtype=torch.bool),
                              torch.zeros(answers, dtype=torch.long), greedy_scores=GREEDY.expand(answers))  # fmt: skip
        probability = logprobs[rows].sum().exp().detach()
        loss = loss + probability * (function(batch) * logprobs[rows]).sum() / answers
    value = (logprobs.sum(1).exp() * rewards.sum(1)).sum()
    return torch.autograd.grad(loss, logits, retain_graph=True)[0], torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize(
    ("name", "answers"), [("reward_to_go", 1), ("remax", 1), ("remax", 2), ("rloo", 2), ("rloo", 3)]
)
def test_the_gradient_is_unbiased(name: str, answers: int) -> None:
    found, true = expected_gradients(ALL[name], answers)
    assert true.abs().max() > 0.01
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("answers", [2, 3])
def test_the_group_mean_only_shrinks_the_gradient_but_the_division_turns_it(answers: int) -> None:
    """Dr. GRPO is RLOO times (k − 1) / k, since an answer is in its own baseline; GRPO is another gradient."""
    found, true = expected_gradients(lambda batch: advantages.grpo(batch, divide_by_std=False), answers)
    torch.testing.assert_close(found, (answers - 1) / answers * true, rtol=1e-9, atol=1e-12)
    standardised, _ = expected_gradients(advantages.grpo, answers)
    cosine = torch.nn.functional.cosine_similarity(standardised.flatten(), true.flatten(), 0)
    assert 0 < cosine < 0.999
