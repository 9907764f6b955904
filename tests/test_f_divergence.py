"""The family of divergences: by hand, on Gaussians and categoricals, and the properties that define each of them."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from rlhf import divergence as d
from rlhf import f_divergence as f

Function = Callable[[Tensor, Tensor], Tensor]
ALPHAS = (0.0, 0.3, 0.5, 1.0, 2.0, 3.0)
SAMPLED: dict[str, Function] = {
    "forward_kl": f.forward_kl,
    "chi_squared": f.chi_squared,
    "total_variation": f.total_variation,
    "hellinger": f.hellinger,
    **{f"alpha {alpha}": partial(f.alpha_divergence, alpha=alpha) for alpha in ALPHAS},
}
EXACT: dict[str, Function] = {
    "forward_kl": f.exact_forward_kl,
    "chi_squared": f.exact_chi_squared,
    "total_variation": f.exact_total_variation,
    "hellinger": f.exact_hellinger,
    **{f"alpha {alpha}": partial(f.exact_alpha_divergence, alpha=alpha) for alpha in ALPHAS},
}
RENYI = {f"renyi {alpha}": partial(f.exact_renyi, alpha=alpha) for alpha in ALPHAS if alpha}
ALL_EXACT = {**EXACT, **RENYI}
logprob = st.floats(-60, 0, width=32)
logits = st.lists(st.floats(-4, 4, width=32), min_size=6, max_size=6)
order = st.floats(0.05, 4).filter(lambda alpha: abs(alpha - 1) > 0.02)


def one(function: Function, logprob: float, ref_logprob: float) -> float:
    """An estimator applied to a single token, in float64."""
    return float(function(*(torch.tensor([[x]], dtype=torch.double) for x in (logprob, ref_logprob))))


def exact(function: Function, p: list[float], q: list[float]) -> float:
    return float(function(torch.tensor([[p]]), torch.tensor([[q]])))


def normals(mean: float, std: float, ref_mean: float, ref_std: float) -> tuple[Normal, Normal]:
    return tuple(Normal(torch.tensor(m, dtype=torch.double), s) for m, s in ((mean, std), (ref_mean, ref_std)))  # type: ignore[return-value]


def mean_under(p: Normal, q: Normal, function: Function) -> float:
    """E[estimator] under p, by the trapezoidal rule: exact to many digits for smooth integrands that vanish early."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.double)
    logprobs, ref_logprobs = p.log_prob(x), q.log_prob(x)
    return float(torch.trapezoid(logprobs.exp() * function(logprobs[None], ref_logprobs[None])[0], x))


# π_θ(y) = ½, π_ref(y) = ¼, so w = ½, and then the other way round, w = 2:
#   forward_kl  ½ ln ½ − ½ + 1 = −.346574 + .5 = 0.153426       2 ln 2 − 2 + 1 = 0.386294
#   chi_squared 2 − 2 + ½ = 0.5                                 ½ − 2 + 2 = 0.5
#   tv          1 − ½ = 0.5                                     0
#   hellinger   ½ (1 − .707107)² = 0.0428932                    ½ (1 − 1.414214)² = 0.0857864
#   α = ½       4 × Hellinger = 0.171573                        0.343146
#   α = 3       (3 − 2w − w^−2) / −6 = (3 − 1 − 4) / −6 = .333333   (3 − 4 − ¼) / −6 = .208333
#   Rényi, α = ½: half of the line α = ½
@pytest.mark.parametrize(
    ("function", "up", "down"),
    [
        (f.forward_kl, 0.153426, 0.386294),
        (f.chi_squared, 0.5, 0.5),
        (f.total_variation, 0.5, 0.0),
        (f.hellinger, 0.0428932, 0.0857864),
        (f.alpha_divergence, 0.171573, 0.343146),
        (partial(f.alpha_divergence, alpha=3), 0.333333, 0.208333),
        (f.renyi, 0.0857864, 0.171573),
        (partial(f.renyi, alpha=1), 0.193147, 0.306853),  # k3
    ],
)
def test_sampled_estimators_agree_with_hand_computation(function: Function, up: float, down: float) -> None:
    assert one(function, math.log(0.5), math.log(0.25)) == pytest.approx(up, abs=1e-6)
    assert one(function, math.log(0.25), math.log(0.5)) == pytest.approx(down, abs=1e-6)
    assert one(function, math.log(0.3), math.log(0.3)) == 0


# p = (½, ½), q = (¼, ¾):
#   forward KL   ¼ ln ½ + ¾ ln 3/2 = −.173287 + .304099 = 0.130812
#   χ²           (¼)/(¼) + (¼)/(¾) − 1 = 1 + .333333 − 1 = 0.333333
#   TV           ½ (¼ + ¼) = 0.25
#   Hellinger    1 − (√⅛ + √⅜) = 1 − (.353553 + .612372) = 0.0340742
#   α = ½        4 × Hellinger = 0.136297;   α = 2: χ²/2 = 0.166667;   α = 1: the KL, 0.143841
#   Rényi, α = ½ −2 ln .965926 = 0.0693359;  α = 2: ln 1.333333 = 0.287682
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (f.exact_forward_kl, 0.130812),
        (f.exact_chi_squared, 0.333333),
        (f.exact_total_variation, 0.25),
        (f.exact_hellinger, 0.0340742),
        (f.exact_alpha_divergence, 0.136297),
        (partial(f.exact_alpha_divergence, alpha=2), 0.166667),
        (partial(f.exact_alpha_divergence, alpha=1), 0.143841),
        (partial(f.exact_alpha_divergence, alpha=0), 0.130812),
        (f.exact_renyi, 0.0693359),
        (partial(f.exact_renyi, alpha=2), 0.287682),
        (partial(f.exact_renyi, alpha=1), 0.143841),
    ],
)
def test_exact_divergences_agree_with_hand_computation(function: Function, expected: float) -> None:
    p, q = ([math.log(x) for x in row] for row in ((0.5, 0.5), (0.25, 0.75)))
    assert exact(function, p, q) == pytest.approx(expected, abs=1e-6)


def test_the_kls_agree_with_torch_distributions() -> None:
    a, b = torch.randn(2, 5, 37, generator=torch.Generator().manual_seed(0))[:, None] * 3
    p, q = Categorical(logits=a), Categorical(logits=b)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(f.exact_forward_kl(a, b), kl_divergence(q, p))
    close(f.exact_alpha_divergence(a, b, 0), kl_divergence(q, p))
    close(f.exact_alpha_divergence(a, b, 1), kl_divergence(p, q))
    close(f.exact_renyi(a, b, 1), kl_divergence(p, q))


@pytest.mark.parametrize("name", SAMPLED)
def test_the_mean_of_an_estimator_is_the_exact_divergence(name: str) -> None:
    a, b = torch.randn(2, 1, 7, 17, generator=torch.Generator().manual_seed(1))
    logp, logq = a[0].log_softmax(-1), b[0].log_softmax(-1)
    mean = (logp.exp() * SAMPLED[name](logp, logq)).sum(-1)
    torch.testing.assert_close(mean, EXACT[name](a, b)[0], rtol=1e-4, atol=1e-5)


# In closed form, with a Gaussian N(μ, σ²) against N(0, 1), or two of the same σ = 1:
#   KL(N(0, 1) ‖ N(μ, σ²)) is torch's; BC = √(2σ / (1 + σ²)) e^(−μ²/4(1 + σ²)) is the mean of √w, so that the squared
#   Hellinger distance is 1 − BC and the α = ½ divergence 4 (1 − BC); of equal σ = 1, χ² = e^(μ²) − 1,
#   TV = 2 Φ(μ/2) − 1, and ∫ p^α q^(1−α) = e^(−α (1 − α) μ² / 2).
@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.0), (-1.1, 1.3), (0.4, 0.8)])
def test_estimators_on_gaussians_have_the_closed_forms(mean: float, std: float) -> None:
    p, q = normals(mean, std, 0.0, 1.0)
    overlap = math.sqrt(2 * std / (1 + std**2)) * math.exp(-(mean**2) / (4 * (1 + std**2)))
    assert mean_under(p, q, f.forward_kl) == pytest.approx(float(kl_divergence(q, p)), rel=2e-3)
    assert mean_under(p, q, d.bregman) == pytest.approx(float(kl_divergence(p, q)), rel=2e-3)
    assert mean_under(p, q, f.hellinger) == pytest.approx(1 - overlap, rel=1e-3)
    assert mean_under(p, q, f.alpha_divergence) == pytest.approx(4 * (1 - overlap), rel=1e-3)


@pytest.mark.parametrize("mean", [0.2, 0.9])
def test_estimators_on_gaussians_of_one_width_have_the_closed_forms(mean: float) -> None:
    p, q = normals(mean, 1.0, 0.0, 1.0)
    assert mean_under(p, q, f.chi_squared) == pytest.approx(math.expm1(mean**2), rel=1e-5)
    assert mean_under(p, q, f.total_variation) == pytest.approx(math.erf(mean / 2 / math.sqrt(2)), rel=1e-5)
    for alpha in (0.3, 2.0, 3.0):
        integral = math.exp(-alpha * (1 - alpha) * mean**2 / 2)
        expected = (1 - integral) / (alpha * (1 - alpha))
        assert mean_under(p, q, partial(f.alpha_divergence, alpha=alpha)) == pytest.approx(expected, rel=1e-3)
        # its logarithm is Rényi's, which the estimator bounds from one side: α μ² / 2
        biased = mean_under(p, q, partial(f.renyi, alpha=alpha))
        assert biased == pytest.approx(alpha * expected, rel=1e-3)
        assert (biased > alpha * mean**2 / 2) == (alpha > 1)


@given(logprob, logprob, st.floats(0, 5))
def test_estimators_are_never_negative_and_zero_at_equality(a: float, b: float, alpha: float) -> None:
    for function in (*SAMPLED.values(), partial(f.alpha_divergence, alpha=alpha)):
        assert one(function, a, b) >= -1e-9
        assert one(function, a, a) == 0
    assert one(f.total_variation, a, b) <= 1
    assert one(f.chi_squared, a, b) == pytest.approx(one(f.chi_squared, b, a), rel=1e-6, abs=1e-9)
    assert one(f.hellinger, a, b) == pytest.approx(one(f.alpha_divergence, a, b) / 4, rel=1e-6, abs=1e-9)


@given(logits, logits, order)
def test_exact_divergences_have_their_properties(p: list[float], q: list[float], alpha: float) -> None:
    for name, function in ALL_EXACT.items():
        assert exact(function, p, q) >= -1e-5, name
        assert exact(function, p, [x + 3 for x in p]) == pytest.approx(0, abs=2e-5), name
    variation, hellinger = exact(f.exact_total_variation, p, q), exact(f.exact_hellinger, p, q)
    kl, chi = exact(d.exact_kl, p, q), exact(f.exact_chi_squared, p, q)
    assert variation == pytest.approx(exact(f.exact_total_variation, q, p), abs=1e-6)
    assert hellinger == pytest.approx(exact(f.exact_hellinger, q, p), abs=1e-6)
    # Tsybakov 2009, section 2.4: H² ≤ TV ≤ √(2 H²), TV² ≤ KL/2 (Pinsker), 2 H² ≤ KL ≤ log(1 + χ²)
    assert hellinger - 1e-5 <= variation <= math.sqrt(2 * hellinger) + 1e-3
    assert variation**2 <= kl / 2 + 1e-5
    assert 2 * hellinger - 1e-5 <= kl <= math.log1p(chi) + 1e-4
    # D_α(p ‖ q) is D_(1−α)(q ‖ p), and Rényi's is its logarithm
    of_alpha = exact(partial(f.exact_alpha_divergence, alpha=alpha), p, q)
    if alpha < 1:
        mirrored = exact(partial(f.exact_alpha_divergence, alpha=1 - alpha), q, p)
        assert of_alpha == pytest.approx(mirrored, rel=1e-3, abs=2e-5)
        renyi = math.log1p(alpha * (alpha - 1) * of_alpha) / (alpha - 1)
        assert exact(partial(f.exact_renyi, alpha=alpha), p, q) == pytest.approx(renyi, rel=1e-3, abs=1e-4)


@given(logits, logits)
def test_the_limits_are_the_two_kls(p: list[float], q: list[float]) -> None:
    kl, forward = exact(d.exact_kl, p, q), exact(f.exact_forward_kl, p, q)
    for alpha, limit in ((0.98, kl), (1.02, kl), (0.02, forward)):
        near = exact(partial(f.exact_alpha_divergence, alpha=alpha), p, q)
        assert near == pytest.approx(limit, rel=0.15, abs=1e-4)
    for alpha in (0.98, 1.02):
        assert exact(partial(f.exact_renyi, alpha=alpha), p, q) == pytest.approx(kl, rel=0.1, abs=1e-4)
    tokens = [math.log(0.2), math.log(0.05)]
    for alpha, limit_of in ((1 - 1e-6, d.bregman), (1 + 1e-6, d.bregman), (1e-6, f.forward_kl)):
        for a, b in (tokens, tokens[::-1]):
            assert one(partial(f.alpha_divergence, alpha=alpha), a, b) == pytest.approx(one(limit_of, a, b), rel=1e-4)


@given(logits, logits)
def test_renyis_divergence_grows_with_its_order(p: list[float], q: list[float]) -> None:
    found = [exact(partial(f.exact_renyi, alpha=alpha), p, q) for alpha in (0.3, 0.7, 1, 1.5, 3)]
    assert all(a <= b + 1e-4 for a, b in pairwise(found))


def test_exponents_are_bounded() -> None:
    e10 = math.exp(10)
    for far in (-11.0, -1000.0):  # δ = −10 or below: w = e^10
        assert one(f.forward_kl, far, -1.0) == pytest.approx(10 * e10 - e10 + 1, rel=1e-9)
        assert one(f.hellinger, far, -1.0) == pytest.approx((1 - math.exp(5)) ** 2 / 2, rel=1e-9)
        for chi in (one(f.chi_squared, far, -1.0), one(f.chi_squared, -1.0, far)):
            assert chi == pytest.approx(e10 - 2 + 1 / e10, rel=1e-9)
    # α = 3 allows δ up to 5: (3 − 2 e^−5 − e^10) / −6
    assert one(partial(f.alpha_divergence, alpha=3), -1.0, -50.0) == pytest.approx((3 - 2 * math.exp(-5) - e10) / -6)


@pytest.mark.parametrize("name", ALL_EXACT)
def test_exact_divergences_are_finite_at_extremes_pure_and_computed_in_float32(name: str) -> None:
    a = torch.tensor([[[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [2.0, 1.0, 0.0]]], requires_grad=True)
    b = torch.tensor([[[-1e4, 1e4, 0.0], [1e4, 0.0, 0.0], [1.0, 2.0, 0.5]]])
    before = a.detach().clone()
    found = ALL_EXACT[name](a, b)
    assert found.isfinite().all()
    assert (found >= -1e-6).all()
    (gradient,) = torch.autograd.grad(found.sum(), a)
    assert gradient.isfinite().all()
    assert torch.equal(a.detach(), before)
    low = a.detach().bfloat16()
    assert torch.equal(ALL_EXACT[name](low, b.bfloat16()), ALL_EXACT[name](low.float(), b.bfloat16().float()))


@pytest.mark.parametrize("name", [name for name in ALL_EXACT if name not in ("forward_kl", "alpha 0.0")])
def test_a_token_that_the_policy_rules_out_is_not_infinite(name: str) -> None:
    a, b = torch.randn(2, 1, 3, 8, generator=torch.Generator().manual_seed(2))
    a[..., 2] = b[..., 2] = -torch.inf
    kept = [0, 1, 3, 4, 5, 6, 7]
    torch.testing.assert_close(ALL_EXACT[name](a, b), ALL_EXACT[name](a[..., kept], b[..., kept]))
    a[..., 4] = -torch.inf
    assert ALL_EXACT[name](a, b).isfinite().all()


@pytest.mark.parametrize("function", [f.alpha_divergence, f.exact_alpha_divergence, f.renyi, f.exact_renyi])
def test_an_order_that_is_none_is_refused(function: Callable) -> None:
    for alpha in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"alpha=.* is not allowed; allowed: a number"):
            function(*torch.zeros((2, 1, 2, 3) if "exact" in function.__name__ else (2, 1, 2)), alpha)
