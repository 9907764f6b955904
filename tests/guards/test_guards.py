"""Guards: each on made-up metrics around its threshold; their settings and options."""

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.errors import GuardStop
from rlhf.evaluation.repetition import repeated_ngrams
from rlhf.guards import MAX_SAVED_BATCHES, Guards
from rlhf.guards.base import SKIPPED, Remedies
from rlhf.guards.detectors import DETECTORS
from rlhf.policy_settings import METHODS
from rlhf.settings import GuardsSettings
from rlhf.stages.evaluation import falls
from tests.helpers.composed_config import composed, composed_settings
from tests.helpers.guard_settings import Line, single_guard


def see(guards: Guards, lines: Iterable[Line]) -> list[int]:
    """The line numbers, from 1, at which a guard found something."""
    return [step for step, line in enumerate(lines, 1) if guards.update(step, line)]


# -- made-up streams -------------------------------------------------------------------------------------------------


def stream(key: str, *values: float) -> list[Line]:
    return [{key: value} for value in values]


def evaluations(*rows: tuple[float, ...]) -> list[Line]:
    """Evaluation metrics from rows of (reward, win rate, KL); the win rate has a standard error of 0.03."""
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
    ("length_cap", 2, 0.3, stream("ppo/missing_eos", 1.0, 1.0, 1.0, 1.0), []),  # no response ever ends
    ("mute", 1, 2.0, stream("eval/response_tokens", 1.0, 12.0, 2.0, 2.1), [1, 3]),
    ("entropy_collapse", 2, 0.3, stream("ppo/entropy", 1.0, 1.0, 0.31, 0.3, 0.28), [5]),
    ("entropy_rise", 2, 1.5, stream("ppo/entropy", 1.0, 1.0, 1.5, 1.5, 1.51), [5]),
    ("explained_variance", 3, 0.0, stream("ppo/explained_variance", -1, -1, 0.1, -1, -1, -1e-3, -1, 0.0), [6, 7]),
    ("spike", 3, 10.0, stream("ppo/grad_norm", 1.0, 99.0, 1.0, 10.0, 100.1, 3.0), [5]),
    ("spike", 3, 10.0, stream("sft/loss", 2.0, 2.1, 1.9, 20.5), [4]),
    ("overoptimization", 1, 3.0, evaluations((0.0, 0.2, 0), (0.5, 0.5, 0.1), (0.6, 0.38, 0.2)), []),
    ("overoptimization", 1, 3.0, evaluations((0.0, 0.2, 0), (0.5, 0.5, 0.1), (0.6, 0.37, 0.2)), [3]),
    ("overoptimization", 1, 3.0, evaluations((0.0, 0.2, 0), (0.5, 0.5, 0.1), (0.4, 0.1, 0.2)), []),
    ("overoptimization", 2, 3.0, evaluations((0.0, 0.5, 0), (0.5, 0.1, 0.1), (0.6, 0.1, 0.2)), [3]),
    ("linear_range", 1, 0.5, evaluations((0.0, 0.2, 0), (9.0, 0.2, 1e-3), (0.4, 0.2, 0.04), (0.42, 0.2, 0.16)), []),
    ("linear_range", 1, 0.5, evaluations((0.0, 0.2, 0), (9.0, 0.2, 1e-3), (0.4, 0.2, 0.04), (0.39, 0.2, 0.16)), [4]),
    ("linear_range", 1, 0.5, evaluations((0.0, 0.2, 0), (-0.4, 0.2, 0.04), (-0.42, 0.2, 0.16)), []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "over", "limit", "lines", "expected"), STREAMS)
def test_a_guard_finds_what_is_beyond_its_limit_and_nothing_else(
    name: str, over: int, limit: float | None, lines: list[Line], expected: list[int]
) -> None:
    guards = Guards(single_guard(name, "warn", over, limit))
    assert see(guards, lines) == expected
    summary = guards.summary()
    assert [found["count"] for found in summary.values()] == ([len(expected)] if expected else [])
    for found in summary.values():
        assert found["first_step"] == expected[0]
        assert "usual cause: " in found["message"]
        assert "; try " in found["message"]
    guards.check()  # a warning never stops the run
    assert not see(Guards(single_guard(name, "off", over, limit)), lines)


def test_every_guard_has_a_setting_and_a_stream_on_which_it_finds_something() -> None:
    names = {item.name for item in fields(GuardsSettings)}
    assert names == set(DETECTORS) == {name for name, _, _, _, expected in STREAMS if expected}


def test_gold_utility_counts_like_the_win_rate() -> None:
    lines = [
        {"eval/reward": reward, "eval/gold_utility": gold, "eval/gold_utility_se": 0.1}
        for reward, gold in ((0.0, 1.3), (0.4, 1.9), (0.6, 1.4))
    ]
    assert see(Guards(single_guard("overoptimization", "warn", 1, 3.0)), lines) == [3]


def test_evaluations_on_the_same_prompts_are_paired() -> None:
    """Every prompt a little worse: within chance for independent evaluations, but significant for paired ones."""
    before = [{"step": 0, "win": [0, 1, 0, 1], "gold_utility": [1.0, 2.0, 3.0, 4.0]}]
    before += [{"step": 5, "win": [1, 1, 0.5, None], "gold_utility": [1.0, 4.0, 9.0, 16.0]}]
    now = {"win": [0, 1, 0, 1], "gold_utility": [0.8, 3.9, 8.8, 15.9]}
    # falls of 1, 0, ½ over three prompts: mean ½, sd ½, se ½ / √3
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
    assert not see(Guards(single_guard("overoptimization", "warn", 1, 3.0)), [best, last])
    assert see(Guards(single_guard("overoptimization", "warn", 1, 3.0)), [best, last | found]) == [2]


def test_non_finite_values_are_ignored() -> None:
    lines = stream("ppo/entropy", 1.0, math.nan, 1.0, math.inf, 0.1, 0.1)
    assert see(Guards(single_guard("entropy_collapse", "warn", 2, 0.3)), lines) == [6]


def test_skips_in_a_row_stop_the_run_even_under_warn() -> None:
    guards = Guards(single_guard("non_finite", "warn", 3))
    for step in (4, 5, 7, 8):  # step 6 was not skipped
        guards.update(step, {SKIPPED: 2.0})
        guards.check()
    guards.update(9, {SKIPPED: 1.0, "ppo/reward": math.nan})
    with pytest.raises(
        GuardStop, match=r"non_finite stopped the run at step 9: a reward was NaN or infinite.* 3 steps"
    ):
        guards.check()


def test_a_warning_is_said_once_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    guards = Guards(single_guard("large_kl", "warn", 1, 0.5))
    counts = [guards.update(step, {"ppo/k1": 1.0}) for step in range(1, 4)]
    assert counts == [{"guard/large_kl": 1.0}, {"guard/large_kl": 2.0}, {"guard/large_kl": 3.0}]
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "1.00 nats per token" in caplog.text


@pytest.mark.parametrize("name", [item.name for item in fields(GuardsSettings)])
def test_replaying_the_first_lines_restores_a_guards_state(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for other, over, limit, lines, _ in STREAMS:
        if other == name:
            numbered = [{"step": step, "time": 0.0, **line} for step, line in enumerate(lines, 1)]
            for cut in range(len(lines)):
                straight, resumed = (Guards(single_guard(name, "warn", over, limit)) for _ in range(2))
                whole = [straight.update(line["step"], line) for line in numbered]
                said = len(caplog.records)
                resumed.replay(numbered[:cut])
                assert len(caplog.records) == said
                assert [resumed.update(line["step"], line) for line in numbered[cut:]] == whole[cut:]
                assert resumed.summary() == straight.summary()


def test_repetition_by_hand() -> None:
    assert repeated_ngrams([[1, 2, 3]]) == 0  # no 4-gram
    assert repeated_ngrams([[1, 2, 3, 4, 5]]) == 0
    assert repeated_ngrams([[7] * 8]) == pytest.approx(1 - 1 / 5)
    assert repeated_ngrams([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4]]) == pytest.approx((1 - 2 / 4) / 2)


def test_inspect_holds_only_so_many(tmp_path: Path) -> None:
    guards = Guards(folder=tmp_path)
    for step in range(MAX_SAVED_BATCHES + 3):
        guards.save_batch(step, {"ids": torch.arange(3)}, "loss")
    assert len(list((tmp_path / "inspect").iterdir())) == MAX_SAVED_BATCHES


# -- advice ----------------------------------------------------------------------------------------------------------

KEY = re.compile(r"(?:sft|reward|ppo|dpo|best_of_n|expert_iteration|kl|model|generation|guards)\.[a-z_.]+[a-z_]")


@pytest.mark.parametrize("lora", ["r8", "none"])
@pytest.mark.parametrize("group", ["sft", "reward", *METHODS])
def test_advice_names_the_keys_of_the_stage_and_they_exist(group: str, lora: str) -> None:
    config, settings = composed(f"lora={lora}"), composed_settings(f"lora={lora}")
    remedies = Remedies.of(settings, getattr(settings, group))
    of_any, of_policies = ("spike", "non_finite"), ("spike", "non_finite", "overoptimization", "linear_range")
    for name, over, limit, lines, expected in STREAMS:
        if not expected or (group != "ppo" and name not in (of_policies if group in METHODS else of_any)):
            continue
        guards = Guards(single_guard(name, "warn", over, limit), remedies=remedies)
        see(guards, lines)
        advice = guards.findings[name].message.partition("usual cause: ")[2]
        assert "{" not in advice
        assert all(OmegaConf.select(config, key, default="absent") != "absent" for key in KEY.findall(advice))
        if group != "ppo":
            assert {key.partition(".")[0] for key in KEY.findall(advice)} == {group}
    rate = "lr_full" if group in METHODS and lora == "none" else "lr"
    assert remedies.lr == f"{group}.{rate}"


def test_advice_is_to_weaken_nothing_that_is_not_there() -> None:
    settings = composed_settings("divergence=none")
    assert Remedies.of(settings, settings.ppo).nearer == "a penalty such as divergence=kl"
    assert Remedies.of(settings, settings.dpo).nearer == "a larger dpo.beta"
    assert Remedies.of(settings, settings.expert_iteration).nearer == "a smaller expert_iteration.n"


# -- settings --------------------------------------------------------------------------------------------------------


def composed_guards(*overrides: str) -> GuardsSettings:
    return composed_settings(*overrides).guards


def test_guard_options_do_what_they_are_called() -> None:
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
