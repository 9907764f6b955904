"""LoRA dropout in PPO: which quantities are computed without dropout, which with it, and with the same masks."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import divergence, ppo
from rlhf.divergence import bregman
from rlhf.rollout.sample import Rollouts
from rlhf.stages.passes import compute_divergence, compute_logprobs, compute_values
from rlhf.stages.ppo import PPO
from tests.helpers.calls import record_calls
from tests.helpers.ppo_stages import LORA, make_ppo, ppo_settings, remove_reward_signal, train
from tests.helpers.training import assert_gradients_close, record_gradients

pytestmark = pytest.mark.parametrize("dropout", [0.1, 0.5])
ONCE = {"epochs": 1, "minibatch_size": 12, "steps": 1, "warmup_steps": 0}


def dropping(dropout: float, folders: SimpleNamespace, folder: Path, *name: str, **options: Any) -> PPO:
    """A PPO stage with LoRA dropout and a non-zero value head, without which all values would be 0."""
    settings = ppo_settings(*name, lora=replace(LORA, dropout=dropout), **{**ONCE, **options})
    stage = make_ppo(settings, folders, folder)
    stage.roles.heads["value"].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return stage


@pytest.mark.parametrize("value", ["adapter", "trunk_head"])
def test_before_any_update_values_are_the_old_values(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, value: str
) -> None:
    stage = dropping(dropout, folders, tmp_path / "s", value_model=value)
    value_losses, experiences = (
        record_calls(monkeypatch, ppo, "value_losses"),
        record_calls(monkeypatch, stage, "make_experience"),
    )
    train(stage, tmp_path)
    assert len(value_losses) > 1
    for (values, old, *_), _ in value_losses:
        assert torch.equal(values.detach(), old)
    experience = experiences[0][1]
    # with dropout many values would lie beyond the clip range
    beyond = (experience.values - experience.old_values).abs()[experience.mask] > stage.ppo.value_clip_range
    assert float(beyond.float().mean()) > 0.05


def test_advantages_and_returns_are_of_the_values_without_dropout(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    stage = dropping(dropout, folders, tmp_path / "s", whiten_rewards=False, whiten_advantages=False)
    make_experience, expected = stage.make_experience, []

    def look(rollouts: Rollouts, *args: Any) -> Any:
        expected.append(compute_values(stage.roles, rollouts.sequences, 60))
        return make_experience(rollouts, *args)

    monkeypatch.setattr(stage, "make_experience", look)
    updates = record_calls(monkeypatch, stage, "update")
    train(stage, tmp_path)
    experience = updates[0][0][0]
    torch.testing.assert_close(experience.values, expected[0], rtol=1e-5, atol=1e-5)
    _, returns = ppo.gae(experience.rewards, expected[0], experience.mask, stage.ppo.gamma, stage.ppo.lam)
    torch.testing.assert_close(experience.returns, returns, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("capture", ["auto", "never"])
def test_penalty_and_kl_are_of_the_policy_that_samples(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, capture: str
) -> None:
    stage = dropping(dropout, folders, tmp_path / "s", "bregman")
    stage.kl = ppo.AdaptiveKL(0.05, 6.0, 0.1)
    stage.engine.capture = capture == "auto"
    measured: list[Tensor] = []
    make_experience = stage.make_experience

    def look(rollouts: Rollouts, *args: Any) -> Any:
        measured.extend(compute_logprobs(stage.roles, role, rollouts.sequences, 60, 0.9) for role in
                        ("policy", "reference"))  # fmt: skip
        return make_experience(rollouts, *args)

    monkeypatch.setattr(stage, "make_experience", look)
    updates = record_calls(monkeypatch, stage, "update")
    policy_losses = record_calls(monkeypatch, ppo, "policy_losses")
    (row,) = train(stage, tmp_path)
    experience, (sampled, reference) = updates[0][0][0], measured
    mask = experience.mask
    k1, k3 = (sampled - reference)[mask].mean(), bregman(sampled, reference)[mask].mean()
    assert row["ppo/k1"] == pytest.approx(float(k1), rel=1e-3, abs=1e-4)
    assert row["ppo/k3"] == row["ppo/penalty"] == pytest.approx(float(k3), rel=1e-3)
    expected = ppo.AdaptiveKL(0.05, 6.0, 0.1)
    expected.update(float(k1) * row["ppo/response_tokens"])
    assert stage.kl.coef == pytest.approx(expected.coef, rel=1e-4)
    # the ratio uses the replayed log-probs with dropout, which are different
    for (logprobs, old, *_), _ in policy_losses:
        torch.testing.assert_close(logprobs.detach(), old, rtol=0, atol=1e-6)
    assert float((experience.old_logprobs - sampled)[mask].abs().max()) > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_exact_divergence_is_without_dropout_in_reward_and_loss(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, checkpointing: bool
) -> None:
    options = {"whiten_rewards": False, "whiten_advantages": False, "max_grad_norm": 1e9}
    stage = dropping(dropout, folders, tmp_path / "s", "exact_kl", "logits", **options)
    stage.kl = ppo.FixedKL(0.7)
    if checkpointing:
        stage.roles.checkpoint_activations()
    trained = [p for p in stage.parameters() if p.requires_grad]
    make_experience, expected = stage.make_experience, []

    def look(rollouts: Rollouts, *args: Any) -> Any:
        experience = make_experience(rollouts, *args)
        exact = compute_divergence(stage.roles, rollouts.sequences, 60, 0.9, divergence.exact_kl)
        torch.testing.assert_close(experience.penalty, exact, rtol=1e-4, atol=1e-5)
        remove_reward_signal(experience)
        with torch.enable_grad():
            batch, roles = rollouts.sequences, stage.roles
            p, q = (roles.output(r)(roles.hidden(r, batch)[batch.predicting]) / 0.9 for r in ("policy", "reference"))
            kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1).detach())).sum(-1).mean()
            expected.extend(torch.autograd.grad(0.7 * kl, trained, allow_unused=True))
        return experience

    monkeypatch.setattr(stage, "make_experience", look)
    with record_gradients() as seen:
        train(stage, tmp_path)
    assert_gradients_close(seen[0], expected, atol=1e-5)


def test_the_gap_between_sampling_and_scoring_is_seen_under_dropout(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    stage = dropping(dropout, folders, tmp_path / "sound")
    assert train(stage, tmp_path / "sound")[0]["ppo/sampling_gap"] < 1e-5
    stage = dropping(dropout, folders, tmp_path / "odd")
    generate = stage.engine.generate
    # samples at another temperature
    monkeypatch.setattr(stage.engine, "generate", lambda *a: generate(*a[:2], replace(a[2], temperature=2.0)))
    assert train(stage, tmp_path / "odd")[0]["ppo/sampling_gap"] > 0.1
