"""Guards: each on a made-up stream at its threshold, then in real training: skipping, stopping, resuming."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader

from rlhf import ppo, root
from rlhf.data.records import Prompt
from rlhf.errors import GuardStop
from rlhf.files import read_json
from rlhf.guards import MOST_SAVED, Guards
from rlhf.guards.signs import GUARDS, SKIPPED, repetition
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.train import train_ppo
from rlhf.report.checks import warnings
from rlhf.report.runs import load
from rlhf.settings import GuardSettings, GuardsSettings, LimitGuard, Settings
from rlhf.stages.batches import SeededBatches
from rlhf.stages.evaluation import falls
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.composed_config import composed_settings
from tests.helpers.made_up_sweeps import write_run
from tests.helpers.ppo_stages import PROMPTS, count_low_words, make_ppo, ppo_settings, train
from tests.helpers.subprocess_runs import QUICK, run_in_subprocess
from tests.helpers.supervised_stages import COMPARISONS, DEMONSTRATIONS, reward_stage, sft_stage
from tests.helpers.training import changed_weights, copy_weights, fit, quiet_trainer, record_gradients

Line = dict[str, float]


def only(name: str, action: str, over: int, limit: float | None = None) -> GuardsSettings:
    """All guards off but one."""
    option = GuardSettings(action, over) if limit is None else LimitGuard(action, over, limit)
    return GuardsSettings(**{name: option})


def see(guards: Guards, lines: Iterable[Line]) -> list[int]:
    """The numbers of the lines, from 1, at which something was found."""
    return [step for step, line in enumerate(lines, 1) if guards.see(step, line)]


# -- made-up streams -------------------------------------------------------------------------------------------------


def stream(key: str, *values: float) -> list[Line]:
    return [{key: value} for value in values]


def evaluations(*rows: tuple[float, ...]) -> list[Line]:
    """(reward, win rate, KL) each, with a standard error of 0.03."""
    names = ("eval/reward", "eval/win_rate", "eval/true_kl")
    return [{**dict(zip(names, row, strict=True)), "eval/win_rate_se": 0.03} for row in rows]


EXPLODED = [{SKIPPED: 1.0}, {}, {SKIPPED: 1.0, "ppo/reward": math.nan}]
STREAMS: list[tuple[str, int, float | None, list[Line], list[int]]] = [
    ("non_finite", 3, None, EXPLODED, [1, 3]),
    ("first_ratio", 1, 0.05, stream("ppo/first_log_ratio", 0.0, 0.049, 0.051, 0.06), [3, 4]),
    ("sampling_gap", 1, 0.005, stream("ppo/sampling_gap", 1e-6, 0.0049, 0.0051, 2.0), [3, 4]),
    ("negative_kl", 2, 0.02, stream("ppo/k1", 0.0, -0.03, -0.009, -0.032, -0.03, 0.1), [4, 5]),
    ("large_kl", 2, 0.5, stream("ppo/k1", 0.1, 0.8, 0.3, 0.69, 0.4), [3, 5]),
    ("repetition", 2, 0.2, stream("ppo/repetition", 0.1, 0.1, 0.3, 0.29, 0.4), [5]),
    ("length_cap", 2, 0.3, stream("ppo/missing_eos", 0.0, 0.2, 0.4, 0.39, 0.5), [5]),
    ("length_cap", 2, 0.3, stream("ppo/missing_eos", 1.0, 1.0, 1.0, 1.0), []),  # a data set without ends
    ("entropy_collapse", 2, 0.3, stream("ppo/entropy", 1.0, 1.0, 0.31, 0.3, 0.28), [5]),
    ("entropy_rise", 2, 1.5, stream("ppo/entropy", 1.0, 1.0, 1.5, 1.5, 1.51), [5]),
    ("explained_variance", 3, 0.0, stream("ppo/explained_variance", -1, -1, 0.1, -1, -1, -1e-3, -1, 0.0), [6, 7]),
    ("spike", 3, 10.0, stream("ppo/grad_norm", 1.0, 99.0, 1.0, 10.0, 100.1, 3.0), [5]),
    ("spike", 3, 10.0, stream("sft/loss", 2.0, 2.1, 1.9, 20.5), [4]),
    ("overoptimization", 1, 3.0, evaluations((0.0, 0.2, 0), (0.5, 0.5, 0.1), (0.6, 0.38, 0.2)), []),
    ("overoptimization", 1, 3.0, evaluations((0.0, 0.2, 0), (0.5, 0.5, 0.1), (0.6, 0.37, 0.2)), [3]),
    ("overoptimization", 1, 3.0, evaluations((0.0, 0.2, 0), (0.5, 0.5, 0.1), (0.4, 0.1, 0.2)), []),  # merely worse
    ("overoptimization", 2, 3.0, evaluations((0.0, 0.5, 0), (0.5, 0.1, 0.1), (0.6, 0.1, 0.2)), [3]),
    ("linear_range", 1, 0.5, evaluations((0.0, 0.2, 0), (9.0, 0.2, 1e-3), (0.4, 0.2, 0.04), (0.42, 0.2, 0.16)), []),
    ("linear_range", 1, 0.5, evaluations((0.0, 0.2, 0), (9.0, 0.2, 1e-3), (0.4, 0.2, 0.04), (0.39, 0.2, 0.16)), [4]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "over", "limit", "lines", "expected"), STREAMS)
def test_a_guard_finds_what_is_beyond_its_limit_and_nothing_else(
    name: str, over: int, limit: float | None, lines: list[Line], expected: list[int]
) -> None:
    guards = Guards(only(name, "warn", over, limit))
    assert see(guards, lines) == expected
    summary = guards.summary()
    assert [found["count"] for found in summary.values()] == ([len(expected)] if expected else [])
    for found in summary.values():
        assert found["first_step"] == expected[0]
        assert "usual cause: " in found["message"]
        assert "; try " in found["message"]
    guards.check()  # a warning never stops
    assert not see(Guards(only(name, "off", over, limit)), lines)


def test_every_guard_has_a_setting_and_a_stream_on_which_it_finds_something() -> None:
    names = {item.name for item in fields(GuardsSettings)}
    assert names == set(GUARDS) == {name for name, _, _, _, expected in STREAMS if expected}


def test_gold_utility_counts_like_the_win_rate() -> None:
    lines = [
        {"eval/reward": reward, "eval/gold_utility": gold, "eval/gold_utility_se": 0.1}
        for reward, gold in ((0.0, 1.3), (0.4, 1.9), (0.6, 1.4))
    ]
    assert see(Guards(only("overoptimization", "warn", 1, 3.0)), lines) == [3]


def test_evaluations_on_the_same_prompts_are_paired() -> None:
    """Every prompt a little worse: no more than chance for independent evaluations, and plain for paired ones."""
    before = [{"step": 0, "win": [0, 1, 0, 1], "gold_utility": [1.0, 2.0, 3.0, 4.0]}]
    before += [{"step": 5, "win": [1, 1, 0.5, None], "gold_utility": [1.0, 4.0, 9.0, 16.0]}]
    now = {"win": [0, 1, 0, 1], "gold_utility": [0.8, 3.9, 8.8, 15.9]}
    # wins 1, 0, ½ over three prompts: mean ½, sd ½, se ½ / √3
    # utility .2, .1, .2, .1: mean .15, sd .057735, se half of it
    expected = {
        "eval/win_rate_fall": 0.5, "eval/win_rate_fall_se": 0.288675,
        "eval/gold_utility_fall": 0.15, "eval/gold_utility_fall_se": 0.0288675,
    }  # fmt: skip
    found = falls(before, now)
    assert found == pytest.approx(expected, rel=1e-5)
    assert falls([], now) == falls([{"step": 0, "win": [1, 1]}], now) == {}
    best = {"eval/reward": 0.1, "eval/gold_utility": 7.5, "eval/gold_utility_se": 3.3}
    last = {"eval/reward": 0.2, "eval/gold_utility": 7.35, "eval/gold_utility_se": 3.3}
    assert not see(Guards(only("overoptimization", "warn", 1, 3.0)), [best, last])
    assert see(Guards(only("overoptimization", "warn", 1, 3.0)), [best, last | found]) == [2]


def test_what_is_no_number_is_no_value() -> None:
    lines = stream("ppo/entropy", 1.0, math.nan, 1.0, math.inf, 0.1, 0.1)
    assert see(Guards(only("entropy_collapse", "warn", 2, 0.3)), lines) == [6]


def test_skips_in_a_row_stop_the_run_even_under_warn() -> None:
    guards = Guards(only("non_finite", "warn", 3))
    for step in (4, 5, 7, 8):  # step 6 was made
        guards.see(step, {SKIPPED: 2.0})
        guards.check()
    guards.see(9, {SKIPPED: 1.0, "ppo/reward": math.nan})
    with pytest.raises(
        GuardStop, match=r"non_finite stopped the run at step 9: a reward was no finite number.* 3 steps"
    ):
        guards.check()


def test_a_warning_is_said_once_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    guards = Guards(only("large_kl", "warn", 1, 0.5))
    counts = [guards.see(step, {"ppo/k1": 1.0}) for step in range(1, 4)]
    assert counts == [{"guard/large_kl": 1.0}, {"guard/large_kl": 2.0}, {"guard/large_kl": 3.0}]
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "1.00 nats per token" in caplog.text


@pytest.mark.parametrize("name", [item.name for item in fields(GuardsSettings)])
def test_replaying_half_of_a_stream_is_having_seen_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for other, over, limit, lines, _ in STREAMS:
        if other == name:
            numbered = [{"step": step, "time": 0.0, **line} for step, line in enumerate(lines, 1)]
            for cut in range(len(lines)):
                straight, resumed = (Guards(only(name, "warn", over, limit)) for _ in range(2))
                whole = [straight.see(line["step"], line) for line in numbered]
                said = len(caplog.records)
                resumed.replay(numbered[:cut])
                assert len(caplog.records) == said
                assert [resumed.see(line["step"], line) for line in numbered[cut:]] == whole[cut:]
                assert resumed.summary() == straight.summary()


def test_repetition_by_hand() -> None:
    assert repetition([[1, 2, 3]]) == 0  # no 4-gram
    assert repetition([[1, 2, 3, 4, 5]]) == 0
    assert repetition([[7] * 8]) == pytest.approx(1 - 1 / 5)
    assert repetition([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4]]) == pytest.approx((1 - 2 / 4) / 2)


def test_inspect_holds_only_so_many(tmp_path: Path) -> None:
    guards = Guards(folder=tmp_path)
    for step in range(MOST_SAVED + 3):
        guards.save(step, {"ids": torch.arange(3)}, "loss")
    assert len(list((tmp_path / "inspect").iterdir())) == MOST_SAVED


# -- settings --------------------------------------------------------------------------------------------------------


def composed_guards(*overrides: str) -> GuardsSettings:
    return composed_settings(*overrides).guards


def test_the_options_say_what_they_are_called() -> None:
    actions = {}
    for option in ("default", "strict", "off"):
        guards = composed_guards(f"guards={option}")
        actions[option] = {item.name: getattr(guards, item.name).action for item in fields(guards)}
    assert set(actions["default"].values()) == {"warn"}
    assert set(actions["off"].values()) == {"off"}
    assert {name for name, action in actions["strict"].items() if action != "stop"} == {"linear_range", "spike"}


def test_the_gap_has_its_limit_by_precision() -> None:
    guards = composed_guards()
    assert guards.at_precision(True).sampling_gap.limit == guards.sampling_gap.limit == 0.005
    assert guards.at_precision(False).sampling_gap.limit == 0.1
    assert guards.at_precision(False).first_ratio == guards.first_ratio


def test_a_bare_off_of_yaml_is_off() -> None:
    assert composed_guards("guards.spike.action=false").spike.action == "off"
    assert composed_guards("guards.spike.action=off").spike.action == "off"


# -- training --------------------------------------------------------------------------------------------------------


def guarded(guards: GuardsSettings, **options: Any) -> Settings:
    return replace(ppo_settings(**options), guards=guards)


def failing_at(
    *calls: int, value: float = math.nan, rows: slice = slice(1)
) -> Callable[[list[str], list[str]], list[float]]:
    """A score that is no number for some of the rollouts at some of its calls, counted from 1."""
    made = 0

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal made
        made += 1
        scores = torch.tensor(count_low_words(prompts, responses))
        if made in calls:
            scores[rows] = value
        return scores.tolist()

    return score


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_once_costs_one_step(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    stage = make_ppo(guarded(only("non_finite", "warn", 3), steps=3), folders, tmp_path / "samples")
    monkeypatch.setattr(stage.scorer, "function", failing_at(2, value=value))
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
    """Without whitening a bad reward stays in its row: that minibatch is left out, the other is learned from."""
    settings = guarded(only("non_finite", "warn", 3), steps=1, whiten_rewards=False, whiten_advantages=False)
    stage = make_ppo(settings, folders, tmp_path / "samples")
    monkeypatch.setattr(stage.scorer, "function", failing_at(1))
    with record_gradients() as seen:
        (row,) = train(stage, tmp_path)
    assert sorted(all(grad is None for grad in step) for step in seen) == [False, False, True, True]
    assert row[SKIPPED] == 2
    assert all(math.isfinite(row[f"ppo/{key}"]) for key in ("policy_loss", "value_loss", "grad_norm", "first_ratio"))
    with safe_open(tmp_path / "inspect/step-000001.safetensors", "pt") as file:
        rows = file.get_tensor("skipped_rows").tolist()
        assert 0 in rows  # the row that failing_at spoils
        assert len(rows) == 6


def test_a_bad_score_does_not_outlive_its_step() -> None:
    """Neither in the moments that scores are divided by, nor in them when the first scores of all are bad."""
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
        guarded(only("non_finite", "warn", 3), steps=1), folders, tmp_path / "s", kl=ppo.AdaptiveKL(0.05, 6.0, 0.1)
    )
    assess = stage.make_experience

    def spoiled(*args: Any) -> Any:
        experience = assess(*args)
        experience.ref_logprobs[0, 0] = math.nan
        return experience

    monkeypatch.setattr(stage, "make_experience", spoiled)
    (row,) = train(stage, tmp_path)
    assert math.isnan(row["ppo/k1"])
    assert stage.kl.coef == 0.05


def test_without_the_guard_the_weights_are_lost(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_ppo(guarded(GuardsSettings(), steps=1), folders, tmp_path / "samples")
    monkeypatch.setattr(stage.scorer, "function", failing_at(1))
    train(stage, tmp_path)
    assert any(not p.isfinite().all() for p in stage.roles.parameters())
    assert not (tmp_path / "inspect").exists()


def test_a_healthy_run_has_the_same_bits_with_all_guards_as_with_none(folders: SimpleNamespace, tmp_path: Path) -> None:
    rows, ends = {}, {}
    for name in ("off", "default"):
        stage = make_ppo(guarded(composed_guards(f"guards={name}"), steps=3), folders, tmp_path / name)
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
    assert rows[0]["ppo/approx_kl"] < 1.5 * target  # of the updates that were made
    far = make_ppo(ppo_settings(**options, target_kl=1e9), folders, tmp_path / "samples")
    train(far, tmp_path / "far")
    assert not changed_weights(copy_weights(free.roles), far.roles)  # a target that is never reached changes nothing


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_supervised_stages_skip_too(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stage, rows = (sft_stage(folders), DEMONSTRATIONS) if kind == "sft" else (reward_stage(folders), COMPARISONS)
    stage.total_steps, stage.guards = 3, Guards(only("non_finite", "warn", 3), tmp_path)
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
    assert stage.trainer.global_step == 3  # a refused step counts: batches and checkpoints stay in step
    assert [line["step"] for line in lines if SKIPPED in line] == [2]
    assert all(bool(p.isfinite().all()) for p in stage.roles.parameters())
    assert (tmp_path / "inspect/step-000002.safetensors").exists()


# -- stopping and resuming -------------------------------------------------------------------------------------------


def whole_run(
    settings: Settings, folders: SimpleNamespace, folder: Path, score: Callable = count_low_words
) -> tuple[PPO, Path]:
    """`train_ppo`, from the start or from where `folder` was left."""
    stage = make_ppo(settings, folders, folder / "samples.jsonl")
    stage.scorer.function = score  # type: ignore[attr-defined]
    stage.evaluator = lambda prompts, responses: ({"eval/win_rate": 0.5}, [{"win": 0.5} for _ in responses])

    folder.mkdir(exist_ok=True)
    rows = [Prompt(prompt, "w5") for prompt in PROMPTS[:4]]
    evaluation: DataLoader = DataLoader(rows, batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    train_ppo(quiet_trainer, stage, PROMPTS, evaluation, folder, "auto")
    return stage, folder


def timeless(folder: Path) -> list[Line]:
    clock = ("time", "ppo/rollouts_per_second")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in read_metrics(folder)]


@pytest.mark.long
def test_killed_and_resumed_the_guards_decide_the_same(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Windows, counts and starts cross the kill; evaluations too."""
    every = GuardsSettings(
        entropy_rise=LimitGuard("warn", 3, 0.5), spike=LimitGuard("warn", 2, 0.9),
        length_cap=LimitGuard("warn", 4, 0.0), linear_range=LimitGuard("warn", 2, 1.0),
    )  # fmt: skip
    settings = guarded(every, steps=7, eval_every=2, checkpoint_every=2, epochs=1)
    straight, folder = whole_run(settings, folders, tmp_path / "straight")
    assert {"entropy_rise", "spike"} <= straight.guards.findings.keys()
    calls = 0

    def dying(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 8:  # five steps and three evaluations: the sixth step is not reached
            raise RuntimeError("the power is gone")
        return count_low_words(prompts, responses)

    with pytest.raises(RuntimeError, match="power"):
        whole_run(settings, folders, tmp_path / "killed", dying)
    assert StepCheckpoints.reached(tmp_path / "killed/checkpoints") == 4
    resumed, again = whole_run(settings, folders, tmp_path / "killed")
    assert timeless(again) == timeless(folder)
    assert any(key.startswith("guard/") for line in timeless(again)[-4:] for key in line)
    assert resumed.guards.summary() == straight.guards.summary()
    assert not changed_weights(copy_weights(straight.roles), resumed.roles)


@pytest.mark.long
def test_a_stopped_run_stops_again_until_the_guard_is_milder(folders: SimpleNamespace, tmp_path: Path) -> None:
    options = {"steps": 4, "eval_every": 10, "checkpoint_every": 1, "epochs": 1}
    strict = guarded(only("large_kl", "stop", 2, 0.0), **options)
    for _ in range(2):
        with pytest.raises(
            GuardStop, match=r"guard large_kl stopped the run at step 2: the KL .* nats per token; usual"
        ):
            whole_run(strict, folders, tmp_path / "run")
        assert StepCheckpoints.reached(tmp_path / "run/checkpoints") == 2
        assert [line["step"] for line in read_metrics(tmp_path / "run") if "ppo/k1" in line] == [1, 2]
    mild, folder = whole_run(guarded(only("large_kl", "warn", 2, 0.0), **options), folders, tmp_path / "run")
    assert mild.guards.summary()["large_kl"]["count"] == 3
    straight, other = whole_run(guarded(GuardsSettings(), **options), folders, tmp_path / "straight")
    assert not changed_weights(copy_weights(straight.roles), mild.roles)
    steps = [[line["step"] for line in read_metrics(where) if "ppo/reward" in line] for where in (folder, other)]
    assert steps[0] == steps[1] == [1, 2, 3, 4]


def test_always_nan_stops_with_a_sound_checkpoint(folders: SimpleNamespace, tmp_path: Path) -> None:
    settings = guarded(only("non_finite", "warn", 2), steps=9, checkpoint_every=1, epochs=1)
    with pytest.raises(GuardStop, match="a reward was no finite number, updates were skipped in 2 steps in a row"):
        whole_run(settings, folders, tmp_path / "run", failing_at(*range(3, 99), rows=slice(None)))
    last = StepCheckpoints(tmp_path / "run/checkpoints", 1).latest()
    assert last is not None
    assert StepCheckpoints.step_of(last) == 3  # call 1 was the evaluation of step 0
    stage = make_ppo(settings, folders, tmp_path / "samples")
    before = copy_weights(stage.roles)
    stage.load_trained(last)
    assert changed_weights(before, stage.roles)
    assert all(bool(p.isfinite().all()) for p in stage.roles.parameters())
    assert len(list((tmp_path / "run/inspect").glob("*.safetensors"))) == 2


@pytest.mark.long
def test_the_command_stops_with_its_own_exit_code_and_leaves_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses):\n    return [float('nan') if len(r) else 0.0 for r in responses]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root()}")
    arguments = [*QUICK, "scorer=function", "scorer.function=mine.score", "ppo.steps=5", "judge=none"]
    said = run_in_subprocess(tmp_path, *arguments, "guards=strict", code=3)
    reason = next(line for line in said.splitlines() if line.startswith("rlhf: guard non_finite stopped the run"))
    assert "Traceback" not in said
    (folder,) = (tmp_path / "outputs/rlhf").iterdir()
    assert read_json(folder / "failed.json")["error"] == reason.removeprefix("rlhf: ")
    assert "step-000001.safetensors" in said
    assert StepCheckpoints.reached(folder / "checkpoints") == 1
    assert "continuing from step 1" in (
        milder := run_in_subprocess(tmp_path, *arguments, code=3)
    )  # the same folder: two more
    assert "3 steps in a row" in milder
    assert "is the same run" not in milder
    assert StepCheckpoints.reached(folder / "checkpoints") == 3
    said = run_in_subprocess(tmp_path, "-m", *arguments, "name=sweep", "guards=strict", "seed=1", code=1)
    assert "1 failed" in said
    assert read_json(next((tmp_path / "outputs/sweep").glob("*/failed.json")))["error"].startswith("guard non_finite")


def test_the_report_warns_of_what_guards_found(tmp_path: Path) -> None:
    found = {"entropy_rise": {"count": 3, "first_step": 18, "message": "the entropy rose; usual cause: x; try y"}}
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s/run-{seed}", "lora_kl", seed, guards=found if seed > 1 else {})
    said = warnings(load([tmp_path / "s"]))
    assert said == [
        "The guard entropy_rise found something in 2 runs (run-2, run-3); in run-2, first at step 18: the entropy rose;"
        " usual cause: x; try y."
    ]


def test_a_stopped_run_is_named_with_its_reason_in_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "s/run-1", "lora_kl", 1)
    (tmp_path / "s/run-2").mkdir()
    (tmp_path / "s/run-2/failed.json").write_text(
        '{"error": "guard spike stopped the run at step 3: x", "traceback": ""}'
    )
    assert "run-2 failed: guard spike stopped the run at step 3: x" in warnings(load([tmp_path / "s"]))
