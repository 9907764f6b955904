"""PPO's formulas against hand-computed numbers and slow definitions, and with garbage in the padding."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf import ppo


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def mask_of(lengths: list[int], time: int) -> Tensor:
    return torch.arange(time) < torch.tensor(lengths)[:, None]


@st.composite
def batches(draw: st.DrawFn, tensors: int = 2) -> tuple[list[Tensor], Tensor]:
    """Random [batch, time] tensors and a ragged mask with at least one token per row."""
    time, rows = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, time), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return [torch.randn(rows, time, generator=generator) for _ in range(tensors)], mask_of(lengths, time)


# -- masked means and whitening --------------------------------------------------------------------------------------


def test_masked_mean_agrees_with_hand_computation() -> None:
    # (1 + 2 + 6) / 3 = 3: the 100 is padding
    assert float(ppo.masked_mean(torch.tensor([[1.0, 2.0], [6.0, 100.0]]), mask_of([2, 1], 2))) == 3


@pytest.mark.parametrize("function", [ppo.masked_mean, ppo.whiten])
def test_empty_mask_is_an_error(function: Callable) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        function(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


def test_whiten_agrees_with_hand_computation() -> None:
    # 1, 3, 5: mean 3, variance 8/3, so ±2 / √(8/3) = ±1.224745
    x, mask = row(1.0, 3.0, 5.0, 77.0), mask_of([3], 4)
    torch.testing.assert_close(ppo.whiten(x, mask), row(-1.224745, 0.0, 1.224745, 0.0))
    torch.testing.assert_close(ppo.whiten(x, mask, keep_mean=True), row(1.775255, 3.0, 4.224745, 0.0))
    assert ppo.whiten(row(2.0, 2.0), mask_of([2], 2)).abs().max() == 0  # zero variance gives 0, not NaN


@given(batches(1))
def test_whiten_gives_zero_mean_and_unit_variance(batch: tuple[list[Tensor], Tensor]) -> None:
    (x,), mask = batch
    for keep in (False, True):
        white = ppo.whiten(x, mask, keep)
        inside = white[mask]
        assert float(inside.mean()) == pytest.approx(float(x[mask].mean()) if keep else 0, abs=1e-5)
        if mask.sum() > 1 and x[mask].var(correction=0) > 1e-3:
            assert float(inside.var(correction=0)) == pytest.approx(1, rel=1e-4)
        assert (white[~mask] == 0).all()


# -- rewards ---------------------------------------------------------------------------------------------------------


def test_shape_rewards_agrees_with_hand_computation() -> None:
    scores, penalty = torch.tensor([2.0, -1.0]), torch.tensor([[0.5, 1.0, 9.0], [0.1, 0.2, 0.3]])
    # β = 0.1: row 0 has 2 tokens: −.05, −.1 + 2; row 1 has 3: −.01, −.02, −.03 − 1
    expected = torch.tensor([[-0.05, 1.9, 0.0], [-0.01, -0.02, -1.03]])
    torch.testing.assert_close(ppo.shape_rewards(scores, penalty, mask_of([2, 3], 3), 0.1), expected)


def test_shape_rewards_refuses_an_empty_row() -> None:
    with pytest.raises(ValueError, match="without any response token"):
        ppo.shape_rewards(torch.ones(2), torch.ones(2, 3), mask_of([2, 0], 3), 0.1)


@given(batches(2), st.floats(0, 1))
def test_shape_rewards_conserves_the_sum(batch: tuple[list[Tensor], Tensor], coef: float) -> None:
    (penalty, other), mask = batch
    scores = other[:, 0]
    total = ppo.shape_rewards(scores, penalty, mask, coef).sum(1)
    torch.testing.assert_close(total, scores - coef * (penalty * mask).sum(1), rtol=1e-4, atol=1e-5)


# -- advantages ------------------------------------------------------------------------------------------------------


def test_gae_agrees_with_hand_computation() -> None:
    # γ = ½, λ = ½, rewards 1, 0, 2, values 1, 2, 3 (and 0 after the end)
    # δ₂ = 2 + 0 − 3 = −1; δ₁ = 0 + 1.5 − 2 = −.5; δ₀ = 1 + 1 − 1 = 1
    # A₂ = −1; A₁ = −.5 + .25 · (−1) = −.75; A₀ = 1 + .25 · (−.75) = .8125; returns = A + V
    advantages, returns = ppo.gae(row(1, 0, 2.0, 50), row(1, 2, 3.0, 60), mask_of([3], 4), 0.5, 0.5)
    torch.testing.assert_close(advantages, row(0.8125, -0.75, -1.0, 0.0))
    torch.testing.assert_close(returns, row(1.8125, 1.25, 2.0, 0.0))


@given(batches(2), st.floats(0, 1), st.floats(0, 1))
def test_gae_agrees_with_its_definition(batch: tuple[list[Tensor], Tensor], gamma: float, lam: float) -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, written out in O(T²) plain Python."""
    (rewards, values), mask = batch
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[i].tolist(), [*values[i, :length].tolist(), 0.0]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-4)
            assert float(returns[i, t]) == pytest.approx(expected + v[t], abs=1e-4)
        assert (advantages[i, length:] == 0).all()
        assert (returns[i, length:] == 0).all()


@given(batches(2))
def test_without_discount_returns_are_the_reward_to_go(batch: tuple[list[Tensor], Tensor]) -> None:
    (rewards, values), mask = batch
    expected = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(ppo.gae(rewards, values, mask, 1.0, 1.0)[1], expected, rtol=1e-4, atol=1e-5)


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),  # d(−A e^x)/dx at x = 0
        (1.5, 2.0, -2.4, 0.0),  # clipped to 1.2: max(−3, −2.4)
        (1.5, -2.0, 3.0, 3.0),  # worse and not clipped: max(3, 2.4)
        (0.5, 2.0, -1.0, -1.0),  # max(−1, −1.6): not clipped
        (0.5, -2.0, 1.6, 0.0),  # clipped to 0.8: max(1, 1.6)
        (1.1, 2.0, -2.2, -2.2),  # inside the range
    ],
)
def test_policy_loss_agrees_with_hand_computation(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = row(-1.0 + math.log(ratio)).requires_grad_()
    result = ppo.policy_losses(logprobs, row(-1.0), row(advantage), 0.2).sum()
    result.backward()
    assert float(result.detach()) == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad is not None
    assert float(logprobs.grad) == pytest.approx(gradient, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.1, 0.405, -0.9),  # old 1, return 2: ½ · .9², inside the range
        (1.5, 0.32, 0.0),  # clipped to 1.2: ½ max(.25, .64), no gradient
        (0.5, 1.125, -1.5),  # ½ max(1.5², 1.2²): going the wrong way is not clipped
        (3.5, 1.125, 1.5),  # beyond the return: ½ max(1.5², .8²)
    ],
)
def test_value_loss_agrees_with_hand_computation(value: float, loss: float, gradient: float) -> None:
    values = row(value).requires_grad_()
    result = ppo.value_losses(values, row(1.0), row(2.0), 0.2).sum()
    result.backward()
    assert float(result.detach()) == pytest.approx(loss, rel=1e-5)
    assert values.grad is not None
    assert float(values.grad) == pytest.approx(gradient, abs=1e-5)


def test_explained_variance_agrees_with_hand_computation() -> None:
    returns, mask = row(1.0, 2.0, 3.0, 50.0), mask_of([3], 4)
    assert float(ppo.explained_variance(returns + 5, returns, mask)) == pytest.approx(
        1
    )  # a constant offset does not count
    assert float(ppo.explained_variance(torch.full((1, 4), 7.0), returns, mask)) == pytest.approx(0)
    # residuals of (3, 2, 1): −2, 0, 2, variance 8/3 against 2/3: 1 − 4 = −3
    assert float(ppo.explained_variance(row(3.0, 2.0, 1.0, 0.0), returns, mask)) == pytest.approx(-3)


# -- padding ---------------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor | tuple[Tensor, ...]]]] = {
    "masked_mean": (1, lambda x, mask: ppo.masked_mean(x, mask)),
    "whiten": (1, lambda x, mask: ppo.whiten(x, mask)),
    "whiten, mean kept": (1, lambda x, mask: ppo.whiten(x, mask, keep_mean=True)),
    "shape_rewards": (1, lambda x, mask: ppo.shape_rewards(torch.ones(len(x)), x, mask, 0.5)),
    "gae": (2, lambda r, v, mask: ppo.gae(r, v, mask, 0.9, 0.8)),
    "explained_variance": (2, lambda v, r, mask: ppo.explained_variance(v, r, mask)),
}


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e9, -1e9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_padding_has_no_effect(name: str, garbage: float) -> None:
    """Padding has no effect on results or gradients, whatever values it holds."""
    count, function = FUNCTIONS[name]
    mask = mask_of([3, 1, 4], 5)
    clean = torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(0)) * mask

    def run(fill: float) -> tuple[list[Tensor], Tensor]:
        inputs = clean.masked_fill(~mask, fill).requires_grad_()
        results = function(*inputs, mask)
        results = results if isinstance(results, tuple) else (results,)
        sum((result * torch.arange(1.0, 1 + result.numel()).view_as(result)).sum() for result in results).backward()
        assert inputs.grad is not None
        return [result.detach() for result in results], inputs.grad

    (expected, gradient), (got, got_gradient) = run(0.0), run(garbage)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
    torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=0)
    assert (got_gradient[:, ~mask] == 0).all()


# -- the KL coefficient ----------------------------------------------------------------------------------------------


def test_adaptive_kl_agrees_with_hand_computation() -> None:
    kl = ppo.AdaptiveKL(0.2, target=6.0, k_beta=0.1)
    kl.update(6.6)  # 6.6 / 6 − 1 = .1: .2 · (1 + .1 · .1) = .202
    assert kl.coef == pytest.approx(0.202)
    kl.update(60.0)  # clipped at .2: .202 · 1.02 = .20604
    assert kl.coef == pytest.approx(0.20604)
    kl.update(-5.0)  # clipped at −.2: .20604 · .98 = .2019192
    assert kl.coef == pytest.approx(0.2019192)


def test_fixed_kl_stays() -> None:
    kl = ppo.FixedKL(0.02)
    kl.update(1e6)
    assert kl.coef == 0.02


def test_whitening_that_keeps_the_mean_pays_for_length() -> None:
    """Sums of whitened rewards are the scaled sums plus a term in the length, with the sign opposite to the mean's."""
    rewards = torch.tensor([[0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.3]])
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    # mean (.9 + .3) / 6 = .2; variance (.81 + .09) / 6 − .04 = .11, s = .331662; lengths 2 and 4 have a deviation of 1
    term = float(ppo.whitening_length_term(rewards, mask))
    assert term == pytest.approx(0.2 * (0.331662 - 1), rel=1e-4)
    sums = ppo.whiten(rewards, mask, keep_mean=True).sum(1) * 0.331662
    assert (sums - rewards.sum(1)).tolist() == pytest.approx([2 * term, 4 * term], rel=1e-4)
    assert float(ppo.whitening_length_term(-rewards, mask)) == pytest.approx(-term)
