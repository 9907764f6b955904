"""An exact divergence in the loss: its gradient by brute force, its unit, and that it restrains."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import ppo
from rlhf.models import heads
from rlhf.stages.ppo import PPO
from tests.helpers.ppo_stages import make_ppo, ppo_settings, train
from tests.helpers.training import record_gradients

PLAIN = {"epochs": 1, "minibatch_size": 12, "steps": 1, "warmup_steps": 0, "max_grad_norm": 1e9}


def brute_force(stage: PPO, experience: Any, coef: float) -> list[Tensor | None]:
    """∇ of coef · mean KL over the response tokens, from the whole logits of plain forward passes."""
    batch, roles = experience.sequences, stage.roles
    logits = {role: roles.output(role)(roles.hidden(role, batch)[batch.predicting]) for role in ("policy", "reference")}
    logp, logq = ((logits[role] / 0.9).log_softmax(-1) for role in ("policy", "reference"))
    exact = (logp.exp() * (logp - logq.detach())).sum(-1)
    if stage.config.divergence.name == "exact_jensen_shannon":
        mixture = ((logp.exp() + logq.exp().detach()) / 2).log()
        exact = (logp.exp() * (logp - mixture) + logq.exp().detach() * (logq.detach() - mixture)).sum(-1) / 2
    trained = [p for p in stage.parameters() if p.requires_grad]
    return list(torch.autograd.grad(coef * exact.mean(), trained, allow_unused=True))


@pytest.mark.parametrize("chunk", [2**24, 7 * 50])
@pytest.mark.parametrize("name", ["exact_kl", "exact_jensen_shannon"])
def test_the_gradient_is_that_of_the_divergence(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", chunk)
    settings = ppo_settings(name, "logits", whiten_rewards=False, whiten_advantages=False, **PLAIN)
    stage = make_ppo(settings, folders, tmp_path / "samples", kl=ppo.FixedKL(0.7))
    assess, expected = stage.make_experience, []

    def without_advantages(*args: Any) -> Any:
        experience = assess(*args)
        experience.advantages = torch.zeros_like(experience.advantages)
        experience.returns = experience.old_values
        with torch.enable_grad():
            expected.extend(brute_force(stage, experience, 0.7))
        return experience

    monkeypatch.setattr(stage, "make_experience", without_advantages)
    with record_gradients() as seen:
        train(stage, tmp_path)
    compared = 0
    for ours, theirs in zip(seen[0], expected, strict=True):
        if theirs is not None and theirs.abs().max() > 0:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
            compared += 1
        elif ours is not None:
            assert ours.abs().max() == 0
    assert compared > 4


def test_its_weight_is_in_the_units_of_the_advantages(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores a hundred times as large, and β too: the same whitened problem, so the same weight."""
    weights = []
    for scale in (1.0, 100.0):
        # without the whitening of rewards, which would leave their mean as it is
        settings = ppo_settings("exact_kl", "logits", whiten_rewards=False, **PLAIN)
        stage = make_ppo(settings, folders, tmp_path / "s", kl=ppo.FixedKL(scale))
        scorer, assess = stage.scorer, stage.make_experience
        stage.scorer = lambda rollouts, scale=scale, scorer=scorer: scale * scorer(rollouts)
        stage.make_experience = lambda *args, assess=assess: weights.append(assess(*args)) or weights[-1]  # type: ignore[method-assign]
        train(stage, tmp_path / str(scale))
    assert float(weights[0].divergence_weight) == pytest.approx(float(weights[1].divergence_weight), rel=1e-3)
    assert float(weights[0].divergence_weight) > 0


@pytest.mark.long
def test_it_leads_back_to_the_reference(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an adapter that has left the reference, the term alone brings the KL down."""
    settings = ppo_settings("exact_kl", "logits", steps=12, lr=1e-2, reference_every=1)
    stage = make_ppo(settings, folders, tmp_path / "samples", kl=ppo.FixedKL(0.5))
    assess = stage.make_experience

    def without_advantages(*args: Any) -> Any:
        experience = assess(*args)
        experience.advantages = torch.zeros_like(experience.advantages)
        return experience

    monkeypatch.setattr(stage, "make_experience", without_advantages)
    rows = train(stage, tmp_path)
    assert rows[-1]["ppo/k3"] < 0.5 * rows[0]["ppo/k3"]
