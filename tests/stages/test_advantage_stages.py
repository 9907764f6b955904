"""PPO's stage with other advantages: what is trained, groups of answers, the loss by brute force, resuming."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models.roles import Roles
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.rollout.sample import Rollouts
from rlhf.stages import experience as experience_module
from rlhf.stages.experience import Experience
from rlhf.stages.minibatches import split_minibatches
from rlhf.stages.passes import logprobs_of
from rlhf.stages.ppo import PPO
from tests.helpers.calls import record_calls
from tests.helpers.ppo_stages import LORA, PROMPTS, make_ppo, ppo_settings, train, with_advantages
from tests.helpers.training import assert_gradients_close, changed_weights, copy_weights, record_gradients

CRITIC_FREE = ["reinforce", "reinforce_plus_plus", "rloo", "grpo", "dr_grpo", "remax"]
ROWS = {"rollout_batch_size": 12, "minibatch_size": 4}  # answers to 3 prompts, four to each, or to 12 prompts


@pytest.mark.parametrize("option", CRITIC_FREE)
def test_without_a_value_function_only_the_policy_is_trained(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    settings = with_advantages(ppo_settings(lora=replace(LORA, dropout=0.2), **ROWS), option)
    stage = make_ppo(settings, folders, tmp_path / "samples")
    before, passes = copy_weights(stage.roles), record_calls(monkeypatch, stage.roles, "states")
    metrics = train(stage, tmp_path)
    assert "value" not in stage.roles.table.keys() | stage.roles.heads.keys()
    moved = changed_weights(before, stage.roles)
    assert moved
    assert all(".policy." in name for name in moved)
    assert {args[0] for args, _ in passes} == {"policy", "reference"}
    for row in metrics:
        assert row["ppo/first_ratio"] == pytest.approx(1, abs=1e-5)
        assert not {"ppo/value_loss", "ppo/explained_variance"} & row.keys()


def one_step(
    stage: PPO, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Rollouts, Experience, list[Tensor | None]]:
    """Train one step; the rollouts, the experience, and the gradients of the first update."""
    experiences = record_calls(monkeypatch, stage, "make_experience")
    with record_gradients() as seen:
        train(stage, folder)
    (rollouts, *_), experience = experiences[0]
    return rollouts, experience, seen[0]


def test_an_answer_is_compared_with_those_to_its_own_prompt(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_advantages(ppo_settings(steps=1, warmup_steps=0, **ROWS), "rloo")
    rollouts, experience, _ = one_step(make_ppo(settings, folders, tmp_path / "s"), tmp_path, monkeypatch)
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(rollouts.prompts):
        groups.setdefault(prompt, []).append(row)
    assert [len(rows) for rows in groups.values()] == [4, 4, 4]
    assert len(set(rollouts.responses)) > 8  # the answers of a group are drawn independently
    returns = experience.rewards.sum(1)
    for rows in groups.values():
        for row in rows:
            others = torch.stack([returns[other] for other in rows if other != row]).mean()
            found = experience.advantages[row][rollouts.mask[row]]
            torch.testing.assert_close(found, (returns[row] - others).expand(len(found)), rtol=1e-4, atol=1e-5)


def test_remax_subtracts_the_score_of_the_greedy_answer(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is normalised, and charged for a missing EOS, as the scores are, but is none of those that set the moments."""
    settings = ppo_settings(
        steps=1, warmup_steps=0, score_normalization="standardize", missing_eos_penalty=0.5, gamma=1.0, **ROWS
    )
    stage = make_ppo(with_advantages(settings, "remax"), folders, tmp_path / "s")
    greedy = record_calls(monkeypatch, stage, "greedy_rollouts")
    rollouts, experience, _ = one_step(stage, tmp_path, monkeypatch)
    (prompts, _), answers = greedy[0]
    assert list(prompts) == rollouts.prompts
    assert stage.normalizer.count == 12
    raw, plain = (stage.scorer(batch).double() for batch in (answers, rollouts))
    baseline = (raw - plain.mean()) / plain.std(correction=0) - 0.5 * ~answers.ended
    for row, length in enumerate(rollouts.mask.sum(1).tolist()):
        to_go = experience.rewards[row, :length].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(experience.advantages[row, :length], to_go - baseline[row].float())


# -- the loss of the first update, from its definition -----------------------------------------------------------------


def brute_force(stage: PPO, experience: Experience, kind: str) -> list[Tensor | None]:
    """The gradient of −A · log π, row by row and divided as `kind` is defined; at the old policy all ratios are 1."""
    batch, losses, tokens = experience.sequences, [], 0
    for row in range(len(batch)):
        part = batch.rows([row])
        logprobs = logprobs_of(stage.roles, "policy", part, stage.config.generation.temperature)
        surrogate = -experience.advantages[row, : len(logprobs)] * logprobs
        tokens += len(logprobs)
        divisor = {"token_mean": 1, "sequence_mean": len(logprobs), "constant": 16}[kind]
        losses.append(surrogate.sum() / divisor)
    loss = torch.stack(losses).sum() / (tokens if kind == "token_mean" else len(batch))
    trained = [p for p in stage.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, allow_unused=True))


@pytest.mark.parametrize(
    ("option", "kind", "ratio"),
    [("rloo", "token_mean", "token"), ("grpo", "sequence_mean", "token"), ("dr_grpo", "constant", "token"),
     ("grpo", "sequence_mean", "sequence")],
)  # fmt: skip
def test_the_first_gradient_is_that_of_the_definition(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, kind: str, ratio: str
) -> None:
    """Over several micro-batches of unequal answers."""
    plain = {"epochs": 1, "steps": 1, "warmup_steps": 0, "max_grad_norm": 1e9, "rollout_batch_size": 12,
             "minibatch_size": 12, "ratio": ratio}  # fmt: skip
    settings = with_advantages(ppo_settings(**plain), option)
    assert settings.ppo.loss_aggregation == kind
    stage, untrained = (make_ppo(settings, folders, tmp_path / "s") for _ in range(2))
    groups = record_calls(monkeypatch, stage, "split_microbatches")
    _, experience, found = one_step(stage, tmp_path, monkeypatch)
    assert len(groups[0][1][0]) > 2
    assert experience.advantages.abs().max() > 0.1
    assert_gradients_close(found, brute_force(untrained, experience, kind), atol=1e-6)


def test_an_exact_divergence_in_the_loss_is_aggregated_likewise(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a weight of 1 for every token, its gradient differs from that of a mean per answer."""
    gradients = []
    for kind in ("token_mean", "sequence_mean"):
        settings = ppo_settings("exact_kl", "logits", steps=1, warmup_steps=0, loss_aggregation=kind, max_grad_norm=1e9)
        stage = make_ppo(settings, folders, tmp_path / kind)
        monkeypatch.setattr(stage, "make_experience", without_advantages(stage.make_experience))
        with record_gradients() as seen:
            train(stage, tmp_path / kind)
        gradients.append(torch.cat([x.flatten() for x in seen[0] if x is not None and x.abs().max() > 0]))
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.05)


def without_advantages(make_experience: Callable[..., Experience]) -> Callable[..., Experience]:
    def made(*arguments: Any) -> Experience:
        experience = make_experience(*arguments)
        experience.advantages = torch.zeros_like(experience.advantages)
        return experience

    return made


# -- groups and batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "size"), [(1, 6), (2, 6), (4, 4), (6, 12)])
def test_all_answers_to_a_prompt_are_in_one_minibatch(samples: int, size: int) -> None:
    prompts = PROMPTS[: 12 // samples * 2]
    rows, minibatches = split_minibatches(prompts, size, seed=3, step=1, samples=samples)
    assert rows == [prompt for prompt in prompts for _ in range(samples)]
    assert sorted(torch.cat(minibatches).tolist()) == list(range(len(rows)))
    for minibatch in minibatches:
        assert len(minibatch) == size
        chosen = [rows[row] for row in minibatch.tolist()]
        assert all(chosen.count(prompt) == samples for prompt in chosen)


def test_a_step_answers_fewer_prompts_and_an_epoch_still_visits_each_once(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = with_advantages(ppo_settings(steps=8, epochs=1, **ROWS), "rloo")
    stage = make_ppo(settings, folders, tmp_path / "s")
    experiences = record_calls(monkeypatch, stage, "make_experience")
    train(stage, tmp_path)
    asked = [rollouts.prompts for (rollouts, *_), _ in experiences]
    assert [len(prompts) for prompts in asked] == [12] * 8  # answers
    assert sorted(prompt for prompts in asked for prompt in prompts[::4]) == sorted(PROMPTS)  # 24 prompts, 3 a step


@pytest.mark.parametrize("option", ["grpo", "remax"])
def test_a_resumed_run_continues_with_the_same_bits(folders: SimpleNamespace, tmp_path: Path, option: str) -> None:
    settings = ppo_settings(steps=4, score_normalization="scale", **ROWS)

    def run(folder: Path, start: int = 0, **options: Any) -> tuple[Roles, list[dict[str, float]]]:
        stage = make_ppo(with_advantages(settings, option), folders, tmp_path / "samples")
        checkpoints = StepCheckpoints(folder / "checkpoints", 2)
        return stage.roles, train(stage, folder, start, callbacks=[checkpoints], **options)

    straight, whole = run(tmp_path / "a")
    torch.manual_seed(99)  # the global generator must not matter
    resumed, rest = run(tmp_path / "b", 2, ckpt_path=tmp_path / "a" / "checkpoints" / "step-000002.ckpt")
    assert len(rest) == 2
    for a, b in zip(whole[2:], rest, strict=True):
        same = {key for key in a if not key.startswith("time") and key != "ppo/rollouts_per_second"}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    assert not changed_weights(copy_weights(straight), resumed)


def test_with_gae_nothing_is_paid_for_the_rest(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_ppo(ppo_settings(steps=1), folders, tmp_path / "s")
    weights = record_calls(monkeypatch, experience_module, "response_weights")
    sampled = record_calls(monkeypatch, stage.engine, "generate")
    _, experience, _ = one_step(stage, tmp_path, monkeypatch)
    assert experience.token_weights is None
    assert not weights
    assert sum(len(args[2].prompts) for args, _ in sampled) == 12
