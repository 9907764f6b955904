"""Guards in real training: skipped updates, target KL, and unchanged results where nothing is found."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from safetensors import safe_open

from rlhf import ppo
from rlhf.guards import Guards
from rlhf.guards.base import SKIPPED
from rlhf.settings import GuardsSettings
from rlhf.stages.batches import SeededBatches
from tests.helpers.composed_config import composed_settings
from tests.helpers.guard_settings import scores_bad_at_calls, settings_with_guards, single_guard
from tests.helpers.ppo_stages import make_ppo, ppo_settings, train
from tests.helpers.supervised_stages import COMPARISONS, DEMONSTRATIONS, reward_stage, sft_stage
from tests.helpers.training import changed_weights, copy_weights, fit, record_gradients


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_single_non_finite_reward_costs_one_step(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    stage = make_ppo(
        settings_with_guards(single_guard("non_finite", "warn", 3), steps=3), folders, tmp_path / "samples"
    )
    monkeypatch.setattr(stage.scorer, "function", scores_bad_at_calls(2, value=value))
    before = copy_weights(stage.roles)
    states: list[dict[str, torch.Tensor]] = []

    class Look(lightning.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            states.append(copy_weights(stage.roles))

    with record_gradients() as seen:
        rows = train(stage, tmp_path, callbacks=[Look()])
    none = [all(grad is None for grad in step) for step in seen]
    assert none == [False] * 4 + [True] * 4 + [False] * 4
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip([before, *states[:-1]], states, strict=True)]
    assert same == [False, True, False]
    assert all(bool(tensor.isfinite().all()) for tensor in states[-1].values())
    assert [row.get(SKIPPED) for row in rows] == [None, 4, None]
    assert [row.get("guard/non_finite") for row in rows] == [None, 1, None]
    assert "ppo/policy_loss" not in rows[1]
    with safe_open(tmp_path / "inspect/step-000002.safetensors", "pt") as file:
        assert file.metadata() == {"step": "2", "reason": "loss"}
        assert {"ids", "prompt_lengths", "lengths", "rewards", "advantages", "skipped_rows"} <= set(file.keys())
        assert not file.get_tensor("rewards").isfinite().all()
        assert file.get_tensor("ids").shape[0] == 12


def test_only_the_minibatch_with_the_bad_row_is_skipped(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without whitening, a bad reward affects its own row only: that minibatch is skipped, the other is used."""
    settings = settings_with_guards(
        single_guard("non_finite", "warn", 3), steps=1, whiten_rewards=False, whiten_advantages=False
    )
    stage = make_ppo(settings, folders, tmp_path / "samples")
    monkeypatch.setattr(stage.scorer, "function", scores_bad_at_calls(1))
    with record_gradients() as seen:
        (row,) = train(stage, tmp_path)
    assert sorted(all(grad is None for grad in step) for step in seen) == [False, False, True, True]
    assert row[SKIPPED] == 2
    assert all(math.isfinite(row[f"ppo/{key}"]) for key in ("policy_loss", "value_loss", "grad_norm", "first_ratio"))
    with safe_open(tmp_path / "inspect/step-000001.safetensors", "pt") as file:
        rows = file.get_tensor("skipped_rows").tolist()
        assert 0 in rows  # the row with the bad score
        assert len(rows) == 6


def test_a_bad_score_does_not_outlive_its_step() -> None:
    """Running moments of the scores ignore bad scores, also when the very first scores are bad."""
    good, bad = torch.tensor([1.0, 3.0]), torch.tensor([math.nan, math.inf])
    spoiled, clean = (ppo.ScoreNormalizer("standardize", None) for _ in range(2))
    spoiled(bad)
    spoiled(torch.cat([good, bad]))
    clean(good)
    assert spoiled.state_dict() == clean.state_dict()
    torch.testing.assert_close(spoiled(good), clean(good), rtol=0, atol=0)


def test_an_unknown_kl_leaves_the_coefficient_alone(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_ppo(
        settings_with_guards(single_guard("non_finite", "warn", 3), steps=1),
        folders,
        tmp_path / "s",
        kl=ppo.AdaptiveKL(0.05, 6.0, 0.1),
    )
    make_experience = stage.make_experience

    def spoiled(*args: Any) -> Any:
        experience = make_experience(*args)
        experience.ref_logprobs[0, 0] = math.nan
        return experience

    monkeypatch.setattr(stage, "make_experience", spoiled)
    (row,) = train(stage, tmp_path)
    assert math.isnan(row["ppo/k1"])
    assert stage.kl.coef == 0.05


def test_without_the_guard_the_weights_are_lost(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_ppo(settings_with_guards(GuardsSettings(), steps=1), folders, tmp_path / "samples")
    monkeypatch.setattr(stage.scorer, "function", scores_bad_at_calls(1))
    train(stage, tmp_path)
    assert any(not p.isfinite().all() for p in stage.roles.parameters())
    assert not (tmp_path / "inspect").exists()


def test_a_healthy_run_has_the_same_bits_with_all_guards_as_with_none(folders: SimpleNamespace, tmp_path: Path) -> None:
    rows, ends = {}, {}
    for name in ("off", "default"):
        stage = make_ppo(
            settings_with_guards(composed_settings(f"guards={name}").guards, steps=3), folders, tmp_path / name
        )
        lines = train(stage, tmp_path / name)
        rows[name] = [{k: v for k, v in r.items() if not k.startswith("time") and "per_second" not in k} for r in lines]
        ends[name] = stage.roles
    assert rows["default"] == rows["off"]
    assert not changed_weights(copy_weights(ends["off"]), ends["default"])


def test_target_kl_ends_the_updates_of_a_step(folders: SimpleNamespace, tmp_path: Path) -> None:
    options = {"steps": 2, "epochs": 3, "warmup_steps": 0}
    free = make_ppo(ppo_settings(**options), folders, tmp_path / "samples")
    with record_gradients() as seen:
        rows = train(free, tmp_path / "free")
    made = len(seen)
    assert all("ppo/stopped_at_kl" not in row for row in rows)
    target = rows[0]["ppo/approx_kl"] / 3
    bound = make_ppo(ppo_settings(**options, target_kl=target), folders, tmp_path / "samples")
    with record_gradients() as seen:
        rows = train(bound, tmp_path / "bound")
    refused = [all(grad is None for grad in step) for step in seen]
    assert sum(refused) == sum("ppo/stopped_at_kl" in row for row in rows) > 0
    assert 2 < len(seen) < made
    assert rows[0]["ppo/stopped_at_kl"] > 1.5 * target
    assert rows[0]["ppo/approx_kl"] < 1.5 * target  # over the updates that were made
    far = make_ppo(ppo_settings(**options, target_kl=1e9), folders, tmp_path / "samples")
    train(far, tmp_path / "far")
    assert not changed_weights(copy_weights(free.roles), far.roles)  # a target that is never exceeded changes nothing


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_supervised_stages_skip_too(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stage, rows = (sft_stage(folders), DEMONSTRATIONS) if kind == "sft" else (reward_stage(folders), COMPARISONS)
    stage.total_steps, stage.guards = 3, Guards(single_guard("non_finite", "warn", 3), tmp_path)
    token_stats, made = stage.roles.token_stats, 0
    scalars = stage.roles.last_token_scores

    def spoiled(real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made
            made += 1
            result = real(*args, **kwargs)
            bad = math.nan if made == 2 else 1.0
            return result._replace(logprobs=result.logprobs * bad) if kind == "sft" else result * bad

        return call

    monkeypatch.setattr(stage.roles, "token_stats", spoiled(token_stats))
    monkeypatch.setattr(stage.roles, "last_token_scores", spoiled(scalars))
    batches = SeededBatches(len(rows), len(rows), 0, 3)
    with record_gradients() as seen:
        lines = fit(stage, stage.encode(rows), batches, tmp_path)  # type: ignore[arg-type]
    assert [all(grad is None for grad in step) for step in seen] == [False, True, False]
    assert stage.trainer.global_step == 3  # a skipped update counts as a step: batches and checkpoints stay aligned
    assert [line["step"] for line in lines if SKIPPED in line] == [2]
    assert all(bool(p.isfinite().all()) for p in stage.roles.parameters())
    assert (tmp_path / "inspect/step-000002.safetensors").exists()
