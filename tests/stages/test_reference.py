"""Moving references: the rules by hand, what penalty and yardstick are measured from, resuming, what is paid."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import ppo
from rlhf.models.roles import MOVING_REFERENCE
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.settings import LoraSettings
from rlhf.stages.losses import Losses
from rlhf.stages.ppo import PPO
from rlhf.stages.reference import EMA, Fixed, Reset, Sync, Weights
from tests.helpers.calls import record_calls
from tests.helpers.ppo_stages import make_ppo, ppo_settings, train
from tests.helpers.training import changed_weights, copy_weights

NAN = float("nan")
FULL = LoraSettings(r=0)


# -- the rules, by hand ----------------------------------------------------------------------------------------------


def followed(rule: Any, policies: list[float], kls: list[float] | None = None) -> tuple[list[float], list[bool], float]:
    """Where the reference is after each step of a policy of one weight, whether it has moved, and the last policy."""
    weights = Weights([torch.tensor([0.0])], [torch.tensor([0.0])], [torch.tensor([0.0])])
    found, moved = [], []
    for step, (policy, kl) in enumerate(zip(policies, kls or [NAN] * len(policies), strict=True), start=1):
        weights.policy[0].fill_(policy)
        moved.append(rule.move(step, kl, weights))
        found.append(round(float(weights.reference[0]), 6))
    return found, moved, float(weights.policy[0])


def test_an_average_forgets_at_its_rate() -> None:
    # 0.1 · 1; 0.9 · 0.1 + 0.1 · 2; 0.9 · 0.29 + 0.1 · 4
    assert followed(EMA(0.9), [1, 2, 4]) == ([0.1, 0.29, 0.661], [True] * 3, 4)
    assert followed(EMA(0.0), [1, 2, 4])[0] == [1, 2, 4]


def test_a_reference_follows_every_few_steps_or_at_a_distance() -> None:
    policies = [1.0, 2.0, 4.0, 8.0]
    assert followed(Sync(2, None), policies)[:2] == ([0, 2, 2, 8], [False, True, False, True])
    assert followed(Sync(2, None, share=0.25), policies)[0] == [0, 0.5, 0.5, 2.375]  # 0.75 · 0.5 + 0.25 · 8
    far = [0.1, 0.3, 0.1, NAN]  # what was not measured moves nothing
    assert followed(Sync(None, 0.2), policies, far)[:2] == ([0, 2, 2, 2], [False, True, False, False])
    assert followed(Sync(3, 0.2), policies, far)[0] == [0, 2, 4, 4]


def test_a_reset_policy_is_its_average_and_the_average_the_sft_model() -> None:
    # the average: 2; 0.5 · 2 + 0.5 · 8 = 5, which the policy becomes; from 0 again: 0.5 · 6 = 3
    found, moved, policy = followed(Reset(2, 0.5), [4, 8])
    assert (found, moved, policy) == ([2, 0], [False, True], 5)
    assert followed(Reset(2, 0.5), [4, 8, 6]) == ([2, 0, 3], [False, True, False], 6)


# -- in a run --------------------------------------------------------------------------------------------------------


def adapter(stage: PPO, role: str) -> list[Tensor]:
    return [weight.detach().clone() for weight in stage.roles.parameters_of(role).values()]


@pytest.mark.parametrize(
    ("divergence", "lora"),
    [(("kl", "logprobs"), None), (("exact_kl", "logits"), FULL),
     pytest.param(("kl", "logprobs"), FULL, marks=pytest.mark.long),
     pytest.param(("exact_kl", "logits"), None, marks=pytest.mark.long)],
)  # fmt: skip
def test_the_penalty_is_measured_from_the_moving_reference_and_the_kl_from_the_sft_model(
    folders: SimpleNamespace, tmp_path: Path, divergence: tuple[str, str], lora: LoraSettings | None
) -> None:
    """A reference that is the policy of the step before costs nothing, however far it is from the SFT model."""
    options = {"lora": lora} if lora else {}
    stage = make_ppo(
        ppo_settings(*divergence, steps=3, **options), folders, tmp_path / "s", warm=False, rule=Sync(1, None)
    )
    rows = train(stage, tmp_path)
    assert [row["ppo/penalty"] for row in rows] == pytest.approx([0] * 3, abs=1e-5)
    assert [row["ppo/reference_k1"] for row in rows] == pytest.approx([0] * 3, abs=1e-5)
    assert [row["ppo/reference_moves"] for row in rows] == [0, 1, 2]
    assert abs(rows[-1]["ppo/k1"]) > 0.01
    assert rows[-1]["ppo/k3"] > 0.01
    pristine = AutoModelForCausalLM.from_pretrained(folders.sft).state_dict()
    base = {name.replace(".base_layer", ""): p for name, p in stage.roles.trunks["base"].state_dict().items()}
    assert all(torch.equal(base[name], value) for name, value in pristine.items())


def test_a_penalty_in_the_loss_is_measured_from_the_moving_reference_too(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a step's first update the policy is such a reference, though it has left the SFT model."""
    placed = ppo.FixedKL(0.7, placement="loss")
    settings = ppo_settings("squared_error", "logprobs", steps=3)
    stage = make_ppo(settings, folders, tmp_path / "s", warm=False, kl=placed, rule=Sync(1, None))
    calls, penalty = [], Losses.sampled_penalty

    def recorded(losses: Losses, experience: Any, rows: Tensor, logprobs: Tensor) -> Tensor:
        calls.append((experience, float(penalty(losses, experience, rows, logprobs).detach())))
        return penalty(losses, experience, rows, logprobs)

    monkeypatch.setattr(Losses, "sampled_penalty", recorded)
    train(stage, tmp_path)
    first = {id(experience): value for experience, value in reversed(calls)}  # of each step
    assert list(first.values()) == pytest.approx([0] * 3, abs=1e-6)
    assert max(value for _, value in calls) > 1e-4
    last = calls[-1][0]
    assert (last.ref_logprobs - last.moving_logprobs).abs().max() > 0.01


@pytest.mark.parametrize("lora", [None, FULL], ids=["lora", "full"])
def test_the_average_is_that_of_the_policies_weights(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraSettings | None
) -> None:
    options = {"lora": lora} if lora else {}
    stage = make_ppo(ppo_settings(steps=3, **options), folders, tmp_path / "s", warm=False, rule=EMA(0.75))
    expected, seen = adapter(stage, "policy"), []
    advance = stage.reference.advance

    def spy(step: int) -> None:
        for average, weight in zip(expected, adapter(stage, "policy"), strict=True):
            average.mul_(0.75).add_(weight, alpha=0.25) if step else None
        advance(step)
        seen.append(adapter(stage, MOVING_REFERENCE))

    monkeypatch.setattr(stage.reference, "advance", spy)
    train(stage, tmp_path)
    assert len(seen) == 3
    for found, average in zip(seen[-1], expected, strict=True):
        torch.testing.assert_close(found, average, rtol=0, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(seen[0], seen[-1], strict=True))


def test_a_reset_leaves_optimiser_and_value_function(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_ppo(ppo_settings(steps=3), folders, tmp_path / "s", warm=False, rule=Reset(2, 0.5))
    sft, advance, seen = adapter(stage, "policy"), stage.reference.advance, []

    def spy(step: int) -> None:
        moments = [{k: v.clone() for k, v in s.items()} for s in stage.optimizers().state.values()]  # type: ignore[union-attr]
        before, value = adapter(stage, "policy"), adapter(stage, "value")
        advance(step)
        seen.append((before, adapter(stage, "policy"), adapter(stage, "average")))
        after = list(stage.optimizers().state.values())  # type: ignore[union-attr]
        assert all(torch.equal(a[k], b[k]) for a, b in zip(moments, after, strict=True) for k in a)
        assert all(map(torch.equal, value, adapter(stage, "value")))

    monkeypatch.setattr(stage.reference, "advance", spy)
    rows = train(stage, tmp_path)
    (_, first, _), (one, _, average), (two, reset, again) = seen
    assert all(map(torch.equal, first, sft))
    for old, a, b, mean, new in zip(sft, one, two, average, reset, strict=True):
        torch.testing.assert_close(mean, (old + a) / 2)
        torch.testing.assert_close(new, (mean + b) / 2)
    assert all(map(torch.equal, again, sft))
    assert any(not torch.equal(a, b) for a, b in zip(two, reset, strict=True))
    assert [row["ppo/reference_moves"] for row in rows] == [0, 0, 1]
    assert "ppo/reference_k1" not in rows[0]  # the penalty is measured from the SFT model


def test_an_adaptive_coefficient_follows_the_distance_that_it_can_control(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl = ppo.AdaptiveKL(0.05, 6.0, 0.1)
    stage = make_ppo(ppo_settings(steps=3), folders, tmp_path / "s", kl=kl, rule=Sync(1, None))
    calls = record_calls(monkeypatch, kl, "update")
    rows = train(stage, tmp_path)
    # the warm policy is far from the SFT model, which the reference still is at first
    assert [args[0] for args, _ in calls] == pytest.approx(
        [row["ppo/reference_k1"] * row["ppo/response_tokens"] for row in rows], rel=1e-4, abs=1e-4
    )
    assert abs(calls[0][0][0]) > 1 > abs(calls[1][0][0])


# -- resuming, and what is paid --------------------------------------------------------------------------------------

RULES = {
    "ema": (lambda: EMA(0.5), {}),
    "sync": (lambda: Sync(2, None), {}),
    "sync at a kl": (lambda: Sync(None, 0.01, 0.5), {}),
    "reset": (lambda: Reset(2, 0.5), {}),
    "full ema": (lambda: EMA(0.5), {"lora": FULL}),
    "full reset": (lambda: Reset(2, 0.5), {"lora": FULL}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("sync at a kl", "reset") else pytest.mark.long) for name in RULES]
)
def test_a_resumed_run_continues_with_the_same_bits(folders: SimpleNamespace, tmp_path: Path, name: str) -> None:
    make, options = RULES[name]

    def run(folder: Path, start: int = 0, **resume: Any) -> tuple[PPO, list[dict[str, float]]]:
        stage = make_ppo(ppo_settings(steps=4, epochs=1, **options), folders, folder / "s", rule=make())
        rows = train(stage, folder, start, callbacks=[StepCheckpoints(folder / "checkpoints", 1, keep=9)], **resume)
        return stage, rows

    straight, whole = run(tmp_path / "a")
    assert whole[-1]["ppo/reference_moves"] > 0
    torch.manual_seed(99)  # the global generator must not matter
    resumed, rest = run(tmp_path / "b", 2, ckpt_path=tmp_path / "a" / "checkpoints" / "step-000002.ckpt")
    for a, b in zip(whole[2:], rest, strict=True):
        same = {key for key in a if not key.startswith("time") and key != "ppo/rollouts_per_second"}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    assert not changed_weights(copy_weights(straight.roles), resumed.roles)


def test_a_rule_that_does_nothing_yet_changes_no_bit(folders: SimpleNamespace, tmp_path: Path) -> None:
    weights = {}
    for rule in (Fixed(), Reset(100, 0.9), Sync(100, None)):
        stage = make_ppo(ppo_settings(steps=1), folders, tmp_path / "s", warm=False, rule=rule)
        train(stage, tmp_path)
        weights[str(rule)] = [*adapter(stage, "policy"), *adapter(stage, "value")]
    plain, *others = weights.values()
    for other in others:
        assert all(map(torch.equal, plain, other))


@pytest.mark.parametrize(("rule", "passes"), [(None, 1), (Reset(100, 0.9), 1), (EMA(0.9), 2)])
def test_only_a_moving_reference_costs_a_pass(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any, passes: int
) -> None:
    settings = ppo_settings(steps=1, epochs=1, microbatch_tokens=10_000)
    stage = make_ppo(settings, folders, tmp_path / "s", rule=rule)
    calls = record_calls(monkeypatch, stage.roles, "states")
    train(stage, tmp_path)
    found = [args[0] for args, _ in calls if args[0] in ("reference", MOVING_REFERENCE)]
    assert len(found) == passes
