"""The losses of DPO against numbers worked out by hand, against published formulas, and their gradients."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf import preference_losses as losses
from rlhf.policy_settings import DPOSettings
from rlhf.preference_losses import MAX_EXPONENT, PreferenceLoss
from rlhf.stages.dpo import loss_of

F_PRIME = [losses.reverse_kl, losses.forward_kl, losses.jensen_shannon, losses.alpha_divergence, losses.chi_squared_kl]
ratios = st.floats(-3, 3)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- by hand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "of_two", "of_half"),
    [
        ("reverse_kl", math.log(2), -math.log(2)),
        ("forward_kl", 0.5, -1.0),  # 1 − 1/u
        ("jensen_shannon", math.log(4 / 3), math.log(2 / 3)),  # log(2u / (1 + u))
        ("alpha_divergence", (1 - 2**-0.5) / 0.5, (1 - 2**0.5) / 0.5),
        ("chi_squared_kl", 1 + math.log(2), -0.5 - math.log(2)),
    ],
)
def test_f_prime_at_a_ratio_of_two_and_of_a_half(divergence: str, of_two: float, of_half: float) -> None:
    found = getattr(losses, divergence)(numbers(math.log(2), math.log(0.5), 0), 0.5)
    torch.testing.assert_close(found, numbers(of_two, of_half, 0))


def test_the_loss_of_dpo_by_hand() -> None:
    """Equation 7 of Rafailov et al.: −log σ(β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l))."""
    dpo = PreferenceLoss(losses.sigmoid, losses.reverse_kl, beta=0.5)
    found = dpo(numbers(1.0, 0.0), numbers(-2.0, 0.0))
    torch.testing.assert_close(found, numbers(-math.log(sigma(1.5)), math.log(2)))
    torch.testing.assert_close(dpo.rewards(numbers(1.0, -2.0)), numbers(0.5, -1.0))


def test_the_losses_of_ipo_and_slic_by_hand() -> None:
    """Azar et al. 2023, equation 17, with τ = β: (h − 1/(2τ))²; Zhao et al. 2023: max(0, δ − margin) with δ = 1."""
    ipo = PreferenceLoss(losses.ipo, losses.reverse_kl, beta=0.1)
    torch.testing.assert_close(ipo(numbers(4.0, 0.0), numbers(-1.0, 0.0)), numbers(0.0, 25.0))
    hinge = PreferenceLoss(losses.hinge, losses.reverse_kl, beta=0.1)
    torch.testing.assert_close(hinge(numbers(4.0, 12.0), numbers(-1.0, 0.0)), numbers(0.5, 0.0))


def test_flipped_labels_by_hand() -> None:
    """cDPO: (1 − ε) L(d) + ε L(−d); robust DPO: ((1 − ε) L(d) − ε L(−d)) / (1 − 2ε)."""
    right, wrong = -math.log(sigma(1.5)), -math.log(sigma(-1.5))
    dpo = PreferenceLoss(losses.sigmoid, losses.reverse_kl, beta=0.5, flipped=0.25)
    pair = numbers(1.0), numbers(-2.0)
    torch.testing.assert_close(dpo(*pair), numbers(0.75 * right + 0.25 * wrong))
    robust = replace(dpo, unbiased=True)
    torch.testing.assert_close(robust(*pair), numbers((0.75 * right - 0.25 * wrong) / 0.5))
    # over labels of which a quarter are flipped, its mean is the loss of the right ones
    torch.testing.assert_close(0.75 * robust(*pair) + 0.25 * robust(*pair[::-1]), numbers(right))


def test_chi_po_clips_the_margin_and_not_the_rewards() -> None:
    """Huang et al. 2024, algorithm 1: log σ(clip_{2R}[β φ(u_w) − β φ(u_l)]), φ(z) = z + log z."""
    chi = PreferenceLoss(losses.sigmoid, losses.chi_squared_kl, beta=0.5, clip=2.0)
    u, v = 3.0, 0.5
    margin = 0.5 * (u + math.log(u) - v - math.log(v))
    assert margin > 2
    torch.testing.assert_close(chi(numbers(math.log(u)), numbers(math.log(v))), numbers(-math.log(sigma(2.0))))
    near = 0.5 * (1.5 + math.log(1.5) - v - math.log(v))
    torch.testing.assert_close(chi(numbers(math.log(1.5)), numbers(math.log(v))), numbers(-math.log(sigma(near))))


# -- the family --------------------------------------------------------------------------------------------------------


def f(divergence: str, u: Tensor, alpha: float) -> Tensor:
    """The divergences as Wang et al. 2023 (table 1) and Huang et al. 2024 define them."""
    return {
        "reverse_kl": lambda: u * u.log(),
        "forward_kl": lambda: -u.log(),
        "jensen_shannon": lambda: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": lambda: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
        "chi_squared_kl": lambda: (u - 1) ** 2 / 2 + u * u.log(),
    }[divergence]()


@given(x=ratios, alpha=st.floats(0.05, 0.95))
@pytest.mark.parametrize("divergence", [function.__name__ for function in F_PRIME])
def test_f_prime_is_the_derivative_of_f_less_its_value_at_the_reference(
    divergence: str, x: float, alpha: float
) -> None:
    u = numbers(math.exp(x), 1.0).requires_grad_()
    (slopes,) = torch.autograd.grad(f(divergence, u, alpha).sum(), u)
    found = getattr(losses, divergence)(numbers(x), alpha)
    torch.testing.assert_close(found, (slopes[0] - slopes[1])[None], rtol=1e-8, atol=1e-9)


@given(x=ratios)
def test_the_alpha_divergence_lies_between_reverse_and_forward_kl(x: float) -> None:
    log_ratio = numbers(x)
    torch.testing.assert_close(losses.alpha_divergence(log_ratio, 1e-9), losses.reverse_kl(log_ratio, 0))
    torch.testing.assert_close(losses.alpha_divergence(log_ratio, 1.0), losses.forward_kl(log_ratio, 0))


@given(chosen=ratios, rejected=ratios, beta=st.floats(0.05, 2), divergence=st.sampled_from(F_PRIME))
def test_a_better_chosen_answer_costs_less(chosen: float, rejected: float, beta: float, divergence: object) -> None:
    loss = PreferenceLoss(losses.sigmoid, divergence, beta)  # type: ignore[arg-type]
    here, better = (loss(numbers(x), numbers(rejected)).item() for x in (chosen, chosen + 0.5))
    assert better < here
    assert loss(numbers(rejected), numbers(rejected)).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("divergence", F_PRIME)
@pytest.mark.parametrize("x", [-1000.0, -MAX_EXPONENT, 0.0, MAX_EXPONENT, 1000.0])
def test_nothing_overflows_in_float32(divergence: object, x: float) -> None:
    loss = PreferenceLoss(losses.sigmoid, divergence, 0.1)  # type: ignore[arg-type]
    chosen = torch.tensor([x], requires_grad=True)
    value = loss(chosen, torch.zeros(1)).sum()
    value.backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert math.isfinite(value.item())
    assert chosen.grad.isfinite().all()


# -- gradients ---------------------------------------------------------------------------------------------------------


@given(chosen=ratios, rejected=ratios, beta=st.floats(0.05, 2))
def test_the_gradient_of_dpo_in_closed_form(chosen: float, rejected: float, beta: float) -> None:
    """Rafailov et al., section 4: −β σ(r(y_l) − r(y_w)) (∇ log π(y_w) − ∇ log π(y_l))."""
    pair = numbers(chosen).requires_grad_(), numbers(rejected).requires_grad_()
    dpo = PreferenceLoss(losses.sigmoid, losses.reverse_kl, beta)
    found = torch.autograd.grad(dpo(*pair).sum(), pair)
    weight = beta * sigma(beta * (rejected - chosen))
    torch.testing.assert_close(torch.cat(found), numbers(-weight, weight))


@given(chosen=ratios, rejected=ratios, divergence=st.sampled_from(F_PRIME), flipped=st.floats(0, 0.4))
def test_the_gradient_of_the_family_in_closed_form(
    chosen: float, rejected: float, divergence: object, flipped: float
) -> None:
    """dL/dx_w = −β (σ(−βd) − ε) u f″(u), where d = f′(u_w) − f′(u_l) and u f″(u) is the slope of f′ in log u."""
    beta, alpha = 0.3, 0.5
    slope = {"reverse_kl": 1.0, "forward_kl": math.exp(-chosen), "jensen_shannon": sigma(-chosen),
             "alpha_divergence": math.exp(-alpha * chosen), "chi_squared_kl": 1 + math.exp(chosen)}  # fmt: skip
    function = divergence.__name__  # type: ignore[attr-defined]
    x = numbers(chosen).requires_grad_()
    loss = PreferenceLoss(losses.sigmoid, divergence, beta, alpha, flipped=flipped)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(loss(x, numbers(rejected)).sum(), x)
    margin = loss.rewards(numbers(chosen)).item() - loss.rewards(numbers(rejected)).item()
    expected = -beta * ((1 - flipped) * sigma(-margin) - flipped * sigma(margin)) * slope[function]
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


# -- from the settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "alpha_divergence", "chi_squared_kl"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_the_settings_name_the_functions(loss: str, name: str) -> None:
    made = loss_of(DPOSettings(loss=loss, divergence=name, beta=0.2, alpha=0.3, clip=4.0, label_smoothing=0.1))
    expected = PreferenceLoss(getattr(losses, loss), getattr(losses, name), 0.2, 0.3, 4.0, 0.1, False)
    assert made == expected
