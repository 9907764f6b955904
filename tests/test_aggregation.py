"""Policy losses beyond PPO's: clip-higher, dual clip, sequence-level ratios, and the aggregation of token losses."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from rlhf import ppo
from rlhf.aggregation import response_means, response_weights

LENGTHS = torch.tensor([1, 4, 3])
LOSSES = torch.tensor([5.0, 1.0, 2.0, 3.0, 6.0, -1.0, 0.5, 2.0])
BY_RESPONSE = [[5.0], [1.0, 2.0, 3.0, 6.0], [-1.0, 0.5, 2.0]]


def aggregated(kind: str) -> float:
    """The mean over all tokens of the weighted losses, as a stage computes it."""
    weights = response_weights(kind, LENGTHS, longest=10).repeat_interleave(LENGTHS)
    return float((weights * LOSSES).sum() / LENGTHS.sum())


def test_aggregations_agree_with_their_definitions() -> None:
    assert aggregated("token_mean") == pytest.approx(18.5 / 8)  # DAPO: all tokens alike
    # GRPO: the mean over answers of the mean over tokens: (5 + 3 + .5) / 3
    assert aggregated("sequence_mean") == pytest.approx(statistics.fmean(map(statistics.fmean, BY_RESPONSE)))
    assert aggregated("sequence_mean") == pytest.approx(8.5 / 3)
    # Dr. GRPO: the mean over answers of the sum over tokens, over a constant: (5 + 12 + 1.5) / 3 / 10
    assert aggregated("constant") == pytest.approx(18.5 / 30)


def test_a_minibatch_of_several_processes_is_aggregated_as_a_whole() -> None:
    """Each process has a share of the responses; `all_reduce` adds its tokens and responses to those of the others."""
    for kind in ("token_mean", "sequence_mean", "constant"):
        whole = response_weights(kind, LENGTHS, 10)
        for own in (slice(0, 1), slice(1, 3)):
            rest = torch.tensor([LENGTHS.sum(), 3]) - torch.tensor([LENGTHS[own].sum(), len(LENGTHS[own])])
            shared = response_weights(kind, LENGTHS[own], 10, lambda x, rest=rest: x + rest)
            torch.testing.assert_close(shared, whole[own])


def test_response_means_agree_with_hand_computation() -> None:
    torch.testing.assert_close(response_means(LOSSES, LENGTHS), torch.tensor([5.0, *[3.0] * 4, *[0.5] * 3]))


# -- clipping ----------------------------------------------------------------------------------------------------------


def loss_and_gradient(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """The loss at a ratio, and its gradient with respect to the log-prob."""
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = ppo.policy_losses(logprob, torch.zeros(1), torch.tensor([advantage]), 0.2, **options).sum()
    (gradient,) = torch.autograd.grad(loss, logprob)
    return float(loss), float(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.25, 2.0, -2.5, -2.5),  # within 1.28: a plain ratio, where 0.2 would have clipped it
        (1.5, 2.0, -2.56, 0.0),  # 1.28 · 2
        (0.9, 2.0, -1.8, -1.8),
        (0.5, -2.0, 1.6, 0.0),  # the lower range stays 0.2: 0.8 · 2
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clip_higher_moves_only_the_upper_bound(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found = loss_and_gradient(ratio, advantage, clip_range_high=0.28)
    assert found == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (2.5, -2.0, 5.0, 5.0),  # below c = 3: −A r
        (4.0, -2.0, 6.0, 0.0),  # −A c, and no gradient
        (4.0, 2.0, -2.4, 0.0),  # positive advantages are clipped as ever
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    assert loss_and_gradient(ratio, advantage, dual_clip=3.0) == pytest.approx((loss, gradient), rel=1e-5)


def test_the_same_range_on_both_sides_is_plain_ppo() -> None:
    numbers = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ppo.policy_losses(*numbers, 0.2), ppo.policy_losses(*numbers, 0.2, 0.2, None))


def test_without_a_value_clip_the_loss_is_half_the_squared_error() -> None:
    found = ppo.value_losses(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1.0]), None)
    assert found.tolist() == [2.0]  # with a clip to 0 ± 0.2 it would be the larger of 2 and 0.32, so 2 as well
    inside = ppo.value_losses(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), None)
    assert inside.tolist() == [0.0]  # where the clip would have left ½ · 0.8²


# -- sequence-level ratios ---------------------------------------------------------------------------------------------


def test_sequence_ratios_are_those_of_gspo() -> None:
    """s_i = (π(y_i) / π_old(y_i))^(1 / |y_i|), and the loss the mean over answers of max(−A s, −A clip(s))."""
    new = torch.tensor([-1.0, -0.5, -2.0, -0.3, -0.9, -1.1, -0.2, -0.4], dtype=torch.double, requires_grad=True)
    old = torch.tensor([-1.2, -0.6, -1.0, -0.6, -0.9, -1.6, -0.5, -0.9], dtype=torch.double)
    advantages = [1.0, -0.5, 2.0]
    found = ppo.policy_losses(
        response_means(new, LENGTHS), response_means(old, LENGTHS),
        torch.tensor(advantages, dtype=torch.double).repeat_interleave(LENGTHS), 0.3,
    )  # fmt: skip
    weights = response_weights("sequence_mean", LENGTHS, 10).repeat_interleave(LENGTHS)
    loss = (found * weights).sum() / LENGTHS.sum()
    # log-ratios .2 | .1, −1, .3, 0 | .5, .3, .5: means .2, −.15, 13/30, of which the last is above 1.3 (1.5424)
    by_hand = -math.exp(0.2), 0.5 * math.exp(-0.15), -2 * 1.3
    assert float(loss) == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, new)
    # ∇ s_i = s_i / |y_i| for each token of the answer
    expected = [-math.exp(0.2) / 3, *[0.5 * math.exp(-0.15) / 4 / 3] * 4, 0.0, 0.0, 0.0]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-9)


def test_at_the_old_policy_gspo_has_the_gradient_of_a_sequence_mean() -> None:
    """The first update of a rollout batch does not depend on the kind of ratio."""
    old = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.double).repeat_interleave(LENGTHS)
    weights = response_weights("sequence_mean", LENGTHS, 10).repeat_interleave(LENGTHS)

    def gradient(sequence: bool) -> Tensor:
        new = old.clone().requires_grad_()
        pair = [response_means(x, LENGTHS) if sequence else x for x in (new, old)]
        return torch.autograd.grad((ppo.policy_losses(*pair, advantages, 0.2) * weights).sum(), new)[0]

    torch.testing.assert_close(gradient(True), gradient(False))
