"""The restoring pull of estimators used as rewards: by hand, against exact autograd, and the table in the docs."""

from pathlib import Path

import pytest
import torch

from rlhf import divergence
from rlhf.report import figures
from rlhf.restoring_pull import ESTIMATORS, FAMILY, gradients, omitted_share, restoring_pull, tables, toy

DOCS = Path(__file__).parents[1] / "docs"


# Of two tokens both gradients are along (1, −1), so that the pull is (d₁ − d₂) / (δ₁ − δ₂).
# π = (½, ½), π_ref = (¼, ¾): δ = (.693147, −.405465), δ₁ − δ₂ = 1.098612
#   clamped .693147 → .630930; k2 (.240227 − .082201) → .143841; k3 (.193147 − .094535) → .089761
#   js ½ ln 4/3 = .143841 and ½ ln(.75/.625) = .091161 → .047952
# π = (.1, .9), π_ref = (¼, ¾): δ = (−.916291, .182322), δ₁ − δ₂ = −1.098612
#   clamped −.182322 → .165956; k2 (.419794 − .016621) → −.366984; k3 (.583709 − .015655) → −.517065
#   js ½ ln(.25/.175) = .178337 and ½ ln(.9/.825) = .043506 → −.122729
@pytest.mark.parametrize(
    ("first", "expected"),
    [(0.5, (1, 0.630930, 0.143841, 0.089761, 0.047952)), (0.1, (1, 0.165956, -0.366984, -0.517065, -0.122729))],
)
def test_the_pull_on_two_tokens_agrees_with_hand_computation(first: float, expected: tuple[float, ...]) -> None:
    policy, reference = (torch.tensor([[p, 1 - p]], dtype=torch.double).log() for p in (first, 0.25))
    pulls = [restoring_pull(own, policy, reference) for own in ESTIMATORS.values()]
    assert pulls == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [*ESTIMATORS, *FAMILY])
def test_the_two_parts_are_the_gradient_of_the_expectation(name: str) -> None:
    logits, reference = toy(0.3)
    logits = logits.clone().requires_grad_()
    estimator, logprobs = {**ESTIMATORS, **FAMILY}[name], logits.log_softmax(-1)
    mean = (logprobs.exp() * estimator(logprobs, reference.log_softmax(-1))).sum(-1).mean()
    rewarded, omitted, _ = gradients(estimator, logits, reference)
    torch.testing.assert_close(rewarded + omitted, torch.autograd.grad(mean, logits)[0])


def test_only_k1_as_a_reward_has_the_gradient_of_the_kl() -> None:
    for distance in (0.003, 0.49):
        pair = toy(distance)
        assert omitted_share(divergence.kl, *pair) < 1e-9
        for name in list(ESTIMATORS)[1:]:
            assert omitted_share(ESTIMATORS[name], *pair) > 0.25
    near = toy(1e-5)
    assert restoring_pull(divergence.clamped_kl, *near) == pytest.approx(0.5, abs=0.01)
    for name in ("squared_error", "bregman", "jensen_shannon"):
        assert restoring_pull(getattr(divergence, name), *near) == pytest.approx(0, abs=0.01)


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_none() -> None:
    pair = toy(0.3)
    _, of_k2, true = gradients(divergence.squared_error, *pair)
    torch.testing.assert_close(of_k2, true)
    assert gradients(divergence.kl, *pair)[1].abs().max() < 1e-12


# Near the reference an f-divergence is f''(1)/2 times χ²: KL, forward KL and α ½, χ² 1, Rényi α/2, Hellinger ⅛.
def test_near_the_reference_the_whole_gradients_differ_by_a_factor() -> None:
    near = toy(1e-5)
    factors = {"forward_kl": 1, "alpha": 1, "chi_squared": 2, "renyi": 0.5, "hellinger": 0.25}
    for name, factor in factors.items():
        assert restoring_pull(FAMILY[name], *near, "whole") == pytest.approx(factor, rel=0.01)
        assert restoring_pull(FAMILY[name], *near) == pytest.approx(0, abs=0.01)
        assert restoring_pull(FAMILY[name], *near, "loss") == pytest.approx(factor, rel=0.01)


def test_an_exact_divergence_as_a_reward_pulls_nothing() -> None:
    policy, reference = toy(0.3)

    def exact(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
        kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1, keepdim=True)
        return kl.expand_as(logprobs)

    assert restoring_pull(exact, policy, reference) == pytest.approx(0, abs=1e-9)


def test_the_documented_tables_are_the_computed_ones() -> None:
    page = (DOCS / "divergences.md").read_text()
    for shown, text in tables().items():
        assert text in page, shown


def test_the_figure_has_all_estimators() -> None:
    figure, numbers = figures.draw_pull("What each estimator pulls as a reward")
    assert {line["estimator"] for line in numbers} == set(ESTIMATORS)
    assert len(figure.axes[0].lines) == len(ESTIMATORS)
    assert "not from these runs" in figures.NOTES["pull"]
