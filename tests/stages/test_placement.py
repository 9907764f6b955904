"""A penalty in the loss or in the reward of real PPO steps: its gradient by brute force, its weight, its cost."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import divergence, ppo
from rlhf.stages.ppo import PPO
from tests.helpers.calls import record_calls
from tests.helpers.ppo_stages import make_ppo, ppo_settings, remove_reward_signal, take_advantages_away, train
from tests.helpers.training import assert_gradients_close, record_gradients

PLAIN = {
    "epochs": 1, "minibatch_size": 12, "steps": 1, "warmup_steps": 0, "max_grad_norm": 1e9,
    "whiten_rewards": False, "whiten_advantages": False,
}  # fmt: skip
LOSS = {"placement": "loss"}


def stage_of(folders: SimpleNamespace, folder: Path, name: str, placed: dict[str, Any], **options: Any) -> PPO:
    kind = "logits" if name.startswith("exact") else "logprobs"
    settings = ppo_settings(name, kind, **{**PLAIN, **options})
    return make_ppo(settings, folders, folder / "samples", kl=ppo.FixedKL(0.7, **placed))


def experiences_of(stage: PPO, folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any = None) -> list[Any]:
    """Train and return what each step learned from, after `change`."""
    make_experience, found = stage.make_experience, []

    def recorded(*args: Any) -> Any:
        found.append(make_experience(*args))
        if change:
            change(found[-1])
        return found[-1]

    monkeypatch.setattr(stage, "make_experience", recorded)
    train(stage, folder)
    return found


def brute_force(stage: PPO, experience: Any, weighted: bool) -> list[Tensor | None]:
    """∇ of 0.7 · mean estimator over the response tokens, from the full logits of a plain forward pass."""
    batch, roles = experience.sequences, stage.roles
    logprobs = [
        (roles.output(role)(roles.hidden(role, batch)[batch.predicting]) / 0.9)
        .log_softmax(-1)
        .gather(-1, batch.target_ids[:, None])
        for role in ("policy", "reference")
    ]
    penalty = getattr(divergence, stage.config.divergence.name)(logprobs[0], logprobs[1].detach())
    ratio = (logprobs[0] - logprobs[0].detach()).exp() if weighted else 1.0
    trained = [p for p in stage.parameters() if p.requires_grad]
    return list(torch.autograd.grad(0.7 * (ratio * penalty).mean(), trained, allow_unused=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["kl", "squared_error", "bregman"])
def test_the_gradient_is_that_of_the_estimator(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weighted: bool
) -> None:
    stage, expected = stage_of(folders, tmp_path, name, {**LOSS, "importance_weight": weighted}), []

    def only_the_penalty(experience: Any) -> None:
        remove_reward_signal(experience)
        with torch.enable_grad():
            expected.extend(brute_force(stage, experience, weighted))

    with record_gradients() as seen:
        experiences_of(stage, tmp_path, monkeypatch, only_the_penalty)
    assert any(g is not None and g.abs().max() > 1e-4 for g in seen[0])
    assert_gradients_close(seen[0], expected, atol=1e-6)


def test_in_the_loss_alone_it_is_measured_but_not_rewarded(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for name in ("squared_error", "exact_kl"):
        for word in ("auto", "reward", "loss", "both"):
            folder = tmp_path / name / word
            stage = stage_of(folders, folder, name, {"placement": word})
            (found[name, word],) = experiences_of(stage, folder, monkeypatch)
        for word in ("auto", "reward", "both"):
            assert torch.equal(found[name, word].rewards, found[name, "auto"].rewards)
        alone = found[name, "loss"]
        assert torch.equal(alone.penalty, found[name, "reward"].penalty)
        assert alone.penalty.abs().max() > 0
        before_the_last = alone.mask.cumsum(1) < alone.mask.sum(1)[:, None]
        assert (alone.rewards[before_the_last] == 0).all()
        torch.testing.assert_close(found[name, "reward"].rewards, alone.rewards - 0.7 * alone.penalty)
    held = {word for word in ("auto", "reward", "loss", "both") if found["exact_kl", word].ref_hidden is not None}
    assert held == {"auto", "loss", "both"}  # the reference's states are kept where the loss reads them


def test_its_weight_is_in_the_units_of_the_advantages(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"whiten_rewards": True, "whiten_advantages": True}
    stage = stage_of(folders, tmp_path, "squared_error", LOSS, **options)
    (experience,) = experiences_of(stage, tmp_path, monkeypatch)
    mask = experience.mask
    rewards = experience.rewards[mask]
    whitened = (experience.rewards - rewards.mean()) / rewards.std(unbiased=False) + rewards.mean()
    advantages, _ = ppo.gae(whitened.where(mask, 0.0), experience.values, mask, 1.0, 0.95)
    expected = 0.7 / (rewards.std(unbiased=False) * advantages[mask].std(unbiased=False))
    assert float(experience.divergence_weight) == pytest.approx(float(expected), rel=1e-4)


def test_a_sampled_estimator_in_the_loss_costs_no_pass(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for word in ("reward", "loss", "both"):
        stage = stage_of(folders, tmp_path / word, "squared_error", {"placement": word}, epochs=2)
        calls = record_calls(monkeypatch, stage.roles, "states")
        train(stage, tmp_path / word)
        counts.append(Counter(role for (role, *_), _ in calls))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0].keys() >= {"policy", "reference", "value"}


@pytest.mark.long
@pytest.mark.parametrize("placed", [LOSS, {**LOSS, "importance_weight": True}])
def test_it_leads_back_to_the_reference(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placed: dict[str, Any]
) -> None:
    """Started from an adapter far from the reference, the term of the loss alone reduces the KL."""
    name = "bregman" if "importance_weight" in placed else "squared_error"
    settings = ppo_settings(name, steps=40, lr=1e-2)
    stage = make_ppo(settings, folders, tmp_path / "samples", kl=ppo.FixedKL(0.5, **placed))
    take_advantages_away(monkeypatch, stage)
    rows = train(stage, tmp_path)
    assert rows[-1]["ppo/k3"] < 0.5 * rows[0]["ppo/k3"]
