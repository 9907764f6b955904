"""Every divergence estimator against hand-computed numbers, and the properties that the paper relies on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from rlhf import divergence as d

LN2 = math.log(2)
SAMPLED = [d.kl, d.clamped_kl, d.bregman, d.squared_error, d.jensen_shannon, d.none, d.negative_kl]
EXACT = [d.exact_kl, d.exact_jensen_shannon]
logprob = st.floats(-60, 0, width=32)
logits = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6)


def one(function: object, logprob: float, ref_logprob: float) -> float:
    """An estimator applied to a single token."""
    return float(function(torch.tensor([[logprob]]), torch.tensor([[ref_logprob]])))  # type: ignore[operator]


def distributions(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, rows, vocabulary, generator=generator) * scale for _ in range(2))
    return a, b


# π_θ(y) = ½, π_ref(y) = ¼: δ = ln 2 = 0.693147
#   kl            0.693147          clamped_kl   max(0, .693147) = 0.693147        negative_kl  −0.693147
#   bregman       e^(−ln 2) − 1 + ln 2 = .5 − 1 + .693147 = 0.193147
#   squared_error .693147² / 2 = .480453 / 2 = 0.240227
#   js            m = (½ + ¼)/2 = .375; ln(.5/.375) = ln 4/3 = .287682; ln(.25/.375) < 0 → 0; ½ · .287682 = 0.143841
# π_θ(y) = ¼, π_ref(y) = ½: δ = −0.693147
#   kl            −0.693147         clamped_kl   0                                 negative_kl  0.693147
#   bregman       e^(ln 2) − 1 − ln 2 = 2 − 1 − .693147 = 0.306853
#   squared_error 0.240227          js  0.143841 (symmetric)
@pytest.mark.parametrize(
    ("function", "up", "down"),
    [
        (d.kl, 0.693147, -0.693147),
        (d.clamped_kl, 0.693147, 0.0),
        (d.bregman, 0.193147, 0.306853),
        (d.squared_error, 0.240227, 0.240227),
        (d.jensen_shannon, 0.143841, 0.143841),
        (d.none, 0.0, 0.0),
        (d.negative_kl, -0.693147, 0.693147),
    ],
)
def test_sampled_estimators_agree_with_hand_computation(function: object, up: float, down: float) -> None:
    assert one(function, math.log(0.5), math.log(0.25)) == pytest.approx(up, abs=1e-6)
    assert one(function, math.log(0.25), math.log(0.5)) == pytest.approx(down, abs=1e-6)
    assert one(function, math.log(0.3), math.log(0.3)) == pytest.approx(0, abs=1e-7)


def test_bregman_is_bounded() -> None:
    # δ = −10: e^10 − 1 − 10 = 22026.4658 − 11 = 22015.4658, and the same for any smaller δ
    assert one(d.bregman, -11.0, -1.0) == pytest.approx(22015.4658, rel=1e-6)
    assert one(d.bregman, -1000.0, -1.0) == pytest.approx(22015.4658, rel=1e-6)
    # δ = −9.5 is below the bound: e^9.5 − 10.5 = 13359.7268 − 10.5
    assert one(d.bregman, -10.5, -1.0) == pytest.approx(13349.2268, rel=1e-6)
    # no bound where the reference finds the token unlikely: δ = 20 gives e^−20 − 1 + 20
    assert one(d.bregman, -1.0, -21.0) == pytest.approx(19.0, rel=1e-6)


@given(logprob, logprob)
def test_sampled_estimators_have_the_papers_properties(a: float, b: float) -> None:
    delta = a - b
    assert one(d.bregman, a, b) >= 0
    assert one(d.squared_error, a, b) >= 0
    assert one(d.clamped_kl, a, b) == max(one(d.kl, a, b), 0)
    assert one(d.negative_kl, a, b) == -one(d.kl, a, b)
    assert -1e-6 <= one(d.jensen_shannon, a, b) <= LN2 / 2 + 1e-6
    assert one(d.jensen_shannon, a, b) == pytest.approx(one(d.jensen_shannon, b, a), abs=1e-6)
    if abs(delta) < 9.9:
        assert one(d.bregman, a, b) == pytest.approx(math.exp(-delta) - 1 + delta, rel=1e-4, abs=1e-4)


def test_small_deltas_keep_their_digits() -> None:
    # k3 ≈ δ²/2 = 5e-7 at δ = 1e-3; exp(−δ) − 1 in float32 would have an error of 6e-8
    delta = torch.tensor([[1e-3]])
    assert float(d.bregman(delta, torch.zeros(1, 1))) == pytest.approx(4.99833e-7, rel=1e-3)


@pytest.mark.parametrize("function", SAMPLED)
def test_sampled_estimators_are_finite_and_pure(function: object) -> None:
    a = torch.tensor([[-1e4, -1e-30, 0.0, -100.0, -1e4]])
    b = torch.tensor([[-1e-30, -1e4, 0.0, -1e4, -1e4]])
    before = a.clone(), b.clone()
    result = function(a, b)  # type: ignore[operator]
    assert result.shape == a.shape
    assert result.isfinite().all()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_exact_divergences_agree_with_hand_computation() -> None:
    # p = (½, ½), q = (¼, ¾): KL = ½ ln 2 + ½ ln ⅔ = .346574 − .202733 = 0.143841
    # m = (.375, .625): ½ [½ ln(.5/.375) + ½ ln(.5/.625)] + ½ [¼ ln(.25/.375) + ¾ ln(.75/.625)]
    #   = ½ [.143841 − .111572] + ½ [−.101366 + .136741] = .0161346 + .0176874 = 0.0338221
    p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    assert float(d.exact_kl(p, q)) == pytest.approx(0.143841, abs=1e-6)
    assert float(d.exact_jensen_shannon(p, q)) == pytest.approx(0.0338221, abs=1e-6)


def test_exact_divergences_agree_with_torch_distributions() -> None:
    a, b = distributions(5, 37)
    p, q = Categorical(logits=a), Categorical(logits=b)
    m = Categorical(probs=(p.probs + q.probs) / 2)
    torch.testing.assert_close(d.exact_kl(a, b), kl_divergence(p, q), rtol=1e-5, atol=1e-5)
    expected = (kl_divergence(p, m) + kl_divergence(q, m)) / 2
    torch.testing.assert_close(d.exact_jensen_shannon(a, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", [d.kl, d.bregman])
def test_exact_kl_is_what_the_unbiased_estimators_estimate(estimator: object) -> None:
    a, b = distributions(5, 17, scale=1.0)
    logp, logq = a.log_softmax(-1), b.log_softmax(-1)
    assert (logp - logq).abs().max() < 10
    value = estimator(logp.flatten(0, 1), logq.flatten(0, 1)).view_as(logp)  # type: ignore[operator]
    torch.testing.assert_close((logp.exp() * value).sum(-1), d.exact_kl(a, b), rtol=1e-5, atol=1e-5)


@given(logits, logits, st.floats(-50, 50, width=32))
def test_exact_divergences_have_their_properties(a: list[float], b: list[float], shift: float) -> None:
    p, q = torch.tensor([[a]]), torch.tensor([[b]])
    assert float(d.exact_kl(p, q)) >= -1e-5
    assert float(d.exact_kl(p, p + shift)) == pytest.approx(0, abs=1e-4)
    js = float(d.exact_jensen_shannon(p, q))
    assert -1e-5 <= js <= LN2 + 1e-5
    assert js == pytest.approx(float(d.exact_jensen_shannon(q, p)), abs=1e-5)
    assert js <= float(d.exact_kl(p, q)) / 2 + 1e-4  # since ½ KL(p ‖ q) = JS + KL(m ‖ q)


@pytest.mark.parametrize("function", EXACT)
def test_exact_divergences_ignore_tokens_of_probability_zero(function: object) -> None:
    """A token of probability 0 contributes nothing, as if it were not in the vocabulary."""
    a, b = distributions(3, 8)
    a[..., 2] = b[..., 2] = -torch.inf
    kept = [0, 1, 3, 4, 5, 6, 7]
    result = function(a, b)  # type: ignore[operator]
    torch.testing.assert_close(result, function(a[..., kept], b[..., kept]))  # type: ignore[operator]
    a[..., 4] = -torch.inf  # ruled out by the policy only: still finite
    assert function(a, b).isfinite().all()  # type: ignore[operator]


@pytest.mark.parametrize("function", EXACT)
def test_exact_divergences_are_finite_at_extremes_and_pure(function: object) -> None:
    a = torch.tensor([[[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]])
    b = torch.tensor([[[-1e4, 1e4, 0.0], [1e4, 0.0, 0.0]]])
    before = a.clone(), b.clone()
    assert function(a, b).isfinite().all()  # type: ignore[operator]
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    # disjoint distributions: KL is the gap of the logits, 2e4; JS is ln 2, its bound
    expected = {d.exact_kl: 2e4, d.exact_jensen_shannon: LN2}[function]  # type: ignore[index]
    assert float(function(a, b)[0, 0]) == pytest.approx(expected, rel=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("function", EXACT)
def test_exact_divergences_in_bfloat16_are_computed_in_float32(function: object) -> None:
    a, b = (x.bfloat16() for x in distributions(2, 9))
    assert torch.equal(function(a, b), function(a.float(), b.float()))  # type: ignore[operator]
