"""An exact divergence in the loss: its gradient by brute force, its weight, and its effect."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import ppo
from rlhf.models import heads
from rlhf.stages.ppo import PPO
from tests.helpers.ppo_stages import make_ppo, ppo_settings, remove_reward_signal, take_advantages_away, train
from tests.helpers.training import assert_gradients_close, record_gradients

PLAIN = {"epochs": 1, "minibatch_size": 12, "steps": 1, "warmup_steps": 0, "max_grad_norm": 1e9}


def brute_force(stage: PPO, experience: Any, coef: float) -> list[Tensor | None]:
    """∇ of coef · mean divergence over response tokens, from the full logits of plain forward passes."""
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
    make_experience, expected = stage.make_experience, []

    def without_advantages(*args: Any) -> Any:
        experience = make_experience(*args)
        remove_reward_signal(experience)
        with torch.enable_grad():
            expected.extend(brute_force(stage, experience, 0.7))
        return experience

    monkeypatch.setattr(stage, "make_experience", without_advantages)
    with record_gradients() as seen:
        train(stage, tmp_path)
    assert_gradients_close(seen[0], expected, atol=1e-6)


def test_its_weight_is_in_the_units_of_the_advantages(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and β multiplied by 100 give the same whitened problem, and therefore the same weight."""
    experiences: list[Any] = []
    for scale in (1.0, 100.0):
        # reward whitening, which keeps the mean, is off
        settings = ppo_settings("exact_kl", "logits", whiten_rewards=False, **PLAIN)
        stage = make_ppo(settings, folders, tmp_path / "s", kl=ppo.FixedKL(scale))
        scorer, make_experience = stage.scorer, stage.make_experience
        stage.scorer = lambda rollouts, scale=scale, scorer=scorer: scale * scorer(rollouts)

        def recorded(*args: Any, make_experience: Any = make_experience) -> Any:
            experiences.append(make_experience(*args))
            return experiences[-1]

        stage.make_experience = recorded  # type: ignore[method-assign]
        train(stage, tmp_path / str(scale))
    assert float(experiences[0].divergence_weight) == pytest.approx(float(experiences[1].divergence_weight), rel=1e-3)
    assert float(experiences[0].divergence_weight) > 0


@pytest.mark.long
def test_it_leads_back_to_the_reference(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from an adapter far from the reference, the divergence term alone reduces the KL."""
    settings = ppo_settings("exact_kl", "logits", steps=12, lr=1e-2, reference_every=1)
    stage = make_ppo(settings, folders, tmp_path / "samples", kl=ppo.FixedKL(0.5))
    take_advantages_away(monkeypatch, stage)
    rows = train(stage, tmp_path)
    assert rows[-1]["ppo/k3"] < 0.5 * rows[0]["ppo/k3"]
