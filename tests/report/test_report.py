"""The report: its statistics against closed forms and by simulation, its files from made-up runs."""

import ast
import csv
import html
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf import root
from rlhf.errors import NoRunsError
from rlhf.report import statistics as st
from rlhf.report.checks import warnings
from rlhf.report.cli import main, make_report
from rlhf.report.figure_style import looks
from rlhf.report.linear_range import initial_line
from rlhf.report.page import config_difference
from rlhf.report.results import comparisons, main_table
from rlhf.report.runs import Sweep, label, load
from rlhf.report.tables import Interval, Number, Table
from rlhf.sweep.states import states
from rlhf.sweep.status import status
from tests.helpers.made_up_sweeps import PROMPTS, STEPS, write_lines, write_run, write_sweep

# -- made-up sweeps ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "table1")


@pytest.fixture(scope="module")
def sweep(sweep_folder: Path) -> Sweep:
    return load([sweep_folder])


# -- statistics --------------------------------------------------------------------------------------------------------


def draw(
    rng: np.random.Generator, seeds: int, prompts: int, seed_sd: float, row_sd: float, gap: float, hard: st.Array
) -> st.Array:
    """Wins of a row in a world where prompts are of different difficulty and seeds of different luck."""
    own, luck = rng.normal(0, row_sd, prompts), rng.normal(0, seed_sd, (seeds, 1))
    return (rng.random((seeds, prompts)) < stats.norm.cdf(gap - 0.4 + hard + own + luck)).astype(float)


def draw_two(
    rng: np.random.Generator, seeds: int, prompts: int, seed_sd: float, row_sd: float, gap: float
) -> tuple[st.Array, st.Array]:
    """Two rows on the same prompts."""
    hard = rng.normal(0, 0.8, prompts)
    first, second = (draw(rng, seeds, prompts, seed_sd, row_sd, level, hard) for level in (gap, 0.0))
    return first, second


# paired, seeds of each row, spread over seeds of each row, spread of a row's own difficulties: how often 95 % hold
REGIMES = [
    (True, (3, 3), (0.05, 0.05), 0.5, 0.97),
    (True, (3, 3), (0.2, 0.2), 0.2, 0.93),
    (True, (2, 2), (0.1, 0.1), 0.2, 0.94),
    (False, (3, 3), (0.1, 0.1), 0.2, 0.97),
    (False, (3, 3), (0.3, 0.05), 0.2, 0.94),
    (False, (3, 12), (0.05, 0.2), 0.2, 0.95),
    (False, (3, 12), (0.2, 0.05), 0.2, 0.93),
]


@pytest.mark.parametrize(("paired", "seeds", "spread", "row_sd", "expected"), REGIMES)
def test_intervals_cover_what_is_said_of_them(
    paired: bool, seeds: tuple[int, int], spread: tuple[float, float], row_sd: float, expected: float
) -> None:
    """Regime by regime: an average over them would hide the one that covers least."""
    rng, hits, prompt_hits = np.random.default_rng(11), [], []
    levels = [
        level / math.sqrt(1 + 0.8**2 + sd**2 + row_sd**2) for level, sd in zip((-0.25, -0.4), spread, strict=True)
    ]
    truth = float(np.subtract(*stats.norm.cdf(levels)))
    for _ in range(500):
        a, b = (
            draw(rng, count, 200, sd, row_sd, gap, hard)
            for hard in [rng.normal(0, 0.8, 200)]
            for count, sd, gap in zip(seeds, spread, (0.15, 0.0), strict=True)
        )
        told = st.difference(a, b, paired, draws=400)
        hits.append(told.low <= truth <= told.high)
        if paired:
            prompt_hits.append(abs(told.mean - truth) <= 1.96 * st.judge_error(a - b, draws=400))
    assert abs(np.mean(hits) - expected) <= 0.025
    # what counting the instructions alone would give: intervals that are too narrow
    assert spread[0] < 0.1 or not paired or np.mean(prompt_hits) < 0.93


def test_the_caption_says_what_a_standard_error_over_few_seeds_covers(sweep: Sweep) -> None:
    made = np.random.default_rng(0).normal(size=(100_000, 3))
    scaled = abs(made.mean(1)) / (made.std(1, ddof=1) / math.sqrt(3))
    assert st.covered(3, 1) == pytest.approx(np.mean(scaled <= 1), abs=0.005)
    assert st.covered(3, 1.96) == pytest.approx(np.mean(scaled <= 1.96), abs=0.005)
    assert st.errors_for(3) == pytest.approx(4.303, abs=0.001)
    caption = main_table(sweep).caption
    assert "With 3 seeds ± holds the true mean in 58 % of cases and ±1.96 standard errors in 81 %" in caption
    assert "for 95 % it takes ±4.3 of them" in caption


def test_the_range_of_seeds_needed_holds_the_truth_as_often_as_it_says() -> None:
    """The gap is held at its true value, so that only the spread has to be estimated."""
    rng, truth, hits = np.random.default_rng(4), (1.96 + 0.84) ** 2 * (0.03**2 + 0.05**2) / 0.05**2, []
    for _ in range(300):
        a, b = (
            np.repeat((luck - luck.mean()) + level, 30).reshape(-1, 30)
            for luck, level in ((rng.normal(0, 0.03, 3), 0.55), (rng.normal(0, 0.05, 3), 0.5))
        )
        need = st.seeds_needed(a, b, paired=False)
        assert need is not None
        assert need.fewest <= need.seeds <= need.most
        hits.append(need.fewest - 2 <= truth <= need.most)
    assert 0.75 <= np.mean(hits) <= 0.9


def test_no_difference_is_rarely_claimed() -> None:
    rng = np.random.default_rng(3)
    claims = [st.difference(*draw_two(rng, 3, 200, 0.1, 0.3, 0.0), True, draws=500).verdict for _ in range(200)]
    assert 1 - claims.count("not distinguishable") / 200 <= 0.07


def test_seed_error_is_that_of_the_mean() -> None:
    values = [0.31, 0.36, 0.40, 0.33]
    assert st.seed_error(values) == pytest.approx(np.std(values, ddof=1) / 2, rel=0.03)
    assert math.isnan(st.seed_error([0.3]))
    assert st.seed_error(values) == st.seed_error(values)


def test_judge_error_is_that_of_a_mean_over_prompts() -> None:
    outcomes = np.random.default_rng(0).integers(0, 2, (3, 200)).astype(float)
    expected = outcomes.mean(axis=0).std(ddof=1) / math.sqrt(200)
    assert st.judge_error(outcomes) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("paired", [True, False])
def test_bootstrapped_components_are_those_of_the_analysis_of_variance(paired: bool) -> None:
    a, b = draw_two(np.random.default_rng(5), 6, 80, 0.5, 0.5, 0.3)
    found = st.components(a, b, paired, draws=20000)
    for group, (seeds, count), residual in zip([a - b] if paired else [a, b], found.seeds, found.residual, strict=True):
        rest = group - group.mean(1, keepdims=True) - group.mean(0) + group.mean()
        assert count == 6
        assert seeds == pytest.approx(group.mean(axis=1).var(ddof=1) / 6, rel=0.05)
        assert residual == pytest.approx((rest**2).sum() / (5 * 79) / (6 * 80), rel=0.05)
    assert found.prompts == pytest.approx((a - b).mean(axis=0).var(ddof=1) / 80, rel=0.05)


def test_without_prompt_effects_the_interval_is_students() -> None:
    a = np.repeat([[0.5], [0.6], [0.4]], 50, axis=1)
    b = np.repeat([[0.3], [0.35], [0.31]], 50, axis=1)
    told = st.difference(a, b, paired=True)
    theirs = stats.ttest_rel(a[:, 0], b[:, 0])
    assert told.p_value == pytest.approx(theirs.pvalue, abs=0.003)
    assert told.low == pytest.approx(theirs.confidence_interval().low, abs=0.01)
    welch = stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    assert st.difference(a, b, paired=False).p_value == pytest.approx(welch.pvalue, abs=0.003)


def test_one_seed_is_told_by_its_prompts_alone() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 60)), rng.random((1, 60)) - 0.5
    told, theirs = st.difference(a, b, paired=False), stats.ttest_rel(a[0], b[0])
    assert told.verdict == "higher"
    assert told.error == pytest.approx((a - b).std(ddof=1) / math.sqrt(60), rel=0.04)
    assert told.p_value < 1e-6
    assert theirs.pvalue < 1e-6
    assert st.seeds_needed(a, b, paired=False) is None


def test_equal_rows_cannot_be_told_apart() -> None:
    same = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(float)
    assert st.difference(same, same, paired=True) == st.Difference(0.0, 0.0, 0.0, 0.0, 1.0)
    assert st.seeds_needed(same, same, paired=True) is None


def test_seeds_needed_is_the_formula_and_keeps_its_promise() -> None:
    rng = np.random.default_rng(2)
    luck = rng.normal(0, 0.08, (4, 1)) - 0.02
    a, b = 0.5 + luck + np.zeros((4, 90)), np.full((4, 90), 0.5)
    gap, variance = abs(float((a - b).mean())), float((a - b).mean(axis=1).var(ddof=1))
    need = st.seeds_needed(a, b, paired=True)
    assert need is not None
    assert need.instructions is None
    normal = (1.96 + 0.84) ** 2 * variance / gap**2
    assert normal <= need.seeds <= 1.05 * normal + 3
    made = rng.normal(gap, math.sqrt(variance), (4000, need.seeds))
    power = np.mean(stats.ttest_1samp(made, 0, axis=1).pvalue < 0.05)
    assert 0.76 <= power <= 0.84


def test_seeds_needed_counts_the_seeds_of_each_row_on_its_own() -> None:
    """Three seeds of variance 0.02² against twelve of 0.06²: a run of each adds 0.02² + 0.06² to the variance."""
    rng = np.random.default_rng(0)
    a, b = (
        np.repeat((luck - luck.mean()) / luck.std(ddof=1) * spread + level, 50).reshape(-1, 50)
        for luck, spread, level in ((rng.normal(size=3), 0.02, 0.5), (rng.normal(size=12), 0.06, 0.53))
    )
    need = st.seeds_needed(a, b, paired=False)
    assert need is not None
    exact = (1.96 + 0.84) ** 2 * (0.02**2 + 0.06**2) / 0.03**2
    assert exact == pytest.approx(34.8, abs=0.1)
    assert exact <= need.seeds <= 1.08 * exact + 2
    made = [rng.normal(level, spread, (4000, need.seeds)) for spread, level in ((0.02, 0.5), (0.06, 0.53))]
    assert 0.76 <= np.mean(stats.ttest_ind(*made, axis=1, equal_var=False).pvalue < 0.05) <= 0.84


def test_instructions_are_asked_for_where_seeds_cannot_help() -> None:
    rng = np.random.default_rng(0)
    per_prompt = rng.normal(0, 0.5, 40)
    a = per_prompt - per_prompt.mean() + 0.05 + rng.normal(0, 0.01, (3, 1))
    need = st.seeds_needed(a, np.zeros((3, 40)), paired=True)
    assert need is not None
    assert need.instructions is not None
    variance = per_prompt.var(ddof=1)
    assert need.instructions == pytest.approx(2 * 7.85 * variance / float(a.mean()) ** 2, rel=0.05)


def test_holm() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert st.holm([0.001, 0.02, math.nan]) == [True, True, False]
    assert st.holm([]) == []


def test_a_straight_beginning_is_found_and_its_end() -> None:
    rng, at = np.random.default_rng(0), np.arange(0, 13) / 10

    def groups(curve: np.ndarray) -> list[np.ndarray]:
        return [
            np.column_stack([np.full(3, x), y + 0.004 * rng.normal(size=3)]) for x, y in zip(at, curve, strict=True)
        ]

    straight = initial_line(groups(0.2 + 0.5 * at), 0.2)
    assert straight is not None
    assert not straight.bent
    assert straight.slope == pytest.approx(0.5, abs=0.01)
    bent = initial_line(groups(0.2 + 0.5 * np.minimum(at, 0.6)), 0.2)
    assert bent is not None
    assert bent.bent
    assert 0.5 <= bent.end <= 0.8
    assert initial_line(groups(at)[:3], 0.0) is None


# -- runs and rows -----------------------------------------------------------------------------------------------------


def test_rows_are_runs_that_differ_in_their_seed(sweep: Sweep) -> None:
    assert [(row.label, row.seeds) for row in sweep.rows] == [
        ("SFT", ()),
        ("variant=full_none", (1, 2, 3)),
        ("variant=lora_kl", (1, 2, 3)),
        ("variant=lora_none", (1, 2, 3)),
    ]
    for row in sweep.rows:
        for metric in ("eval/win_rate", "eval/factual_precision", "eval/response_tokens"):
            outcomes = row.outcomes(metric)
            assert outcomes is not None
            assert outcomes.shape == (max(1, len(row.seeds)), PROMPTS)
            assert outcomes.mean(axis=1) == pytest.approx(row.values(metric))


def test_labels() -> None:
    names = {"variant=kl": "KL", "none": "no penalty", "variant=kl, lora.r=8": "both"}
    assert label(["variant=kl"], names) == "KL"
    assert label(["divergence=none", "lora.r=4"], names) == "no penalty, lora.r=4"
    assert label(["variant=kl", "lora.r=8"], names) == "both"
    assert label([], names) == "PPO"


def test_a_resumed_run_and_a_torn_line(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "a", "lora_kl", 1)
    with (tmp_path / "sweep" / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "time": 9.0, "eval/win_rate": 0.75}\n{"step": 60, "ti')
    run = load([tmp_path / "sweep"]).finished[0]
    assert run.evaluations[50]["eval/win_rate"] == 0.75
    assert "eval/true_kl" in run.evaluations[50]
    assert max(run.metrics) == 50


def test_a_run_taken_over_reads_where_it_was_made(tmp_path: Path) -> None:
    write_run(tmp_path / "one" / "a", "lora_kl", 1)
    summary = json.loads((tmp_path / "one" / "a" / "summary.json").read_text())
    (tmp_path / "two" / "b").mkdir(parents=True)
    (tmp_path / "two" / "b" / "summary.json").write_text(json.dumps({**summary, "same_as": "../../one/a"}))
    assert list(load([tmp_path / "two"]).finished[0].evaluations) == list(STEPS)


def test_failed_missing_and_odd_runs_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    write_run(folder / "a", "lora_kl", 1)
    write_run(folder / "b", "lora_none", 1, git_commit="def+", versions={"torch": "2.14"})
    write_run(folder / "again", "lora_kl", 1)
    write_lines(folder / "b" / "metrics.jsonl", [{"step": 9, "ppo/missing_eos": 0.5, "ppo/reward": math.nan}])
    (folder / "c").mkdir()
    (folder / "c" / "failed.json").write_text('{"error": "out of memory"}')
    (folder / "d").mkdir()
    (folder / "d" / "metrics.jsonl").write_text("")
    plan = [{"folder": name, "overrides": [f"variant={name}", "seed=1"]} for name in "abcde"]
    (folder / "plan.json").write_text(json.dumps({"runs": plan}))
    found = load([folder])
    assert {run.name: run.state for run in found.runs} == {
        "a": "finished", "b": "finished", "again": "finished", "c": "failed", "d": "unfinished", "e": "missing",
    }  # fmt: skip
    text = "\n".join(warnings(found))
    for words in ("c failed: out of memory", "1 run not finished (d)", "(e)", f"left out: {folder / 'again'}",
                  "b has non-finite values in ppo/reward", "50 % of its sampled responses", "One seed only",
                  "different commits (abc, def+)", "uncommitted changes (def+)", "of torch (2.13, 2.14)"):  # fmt: skip
        assert words in text


def reconfigured(folder: Path, **config: Any) -> None:
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "config": {**summary["config"], **config}}))


def test_runs_of_other_configurations_are_no_seeds_of_a_row(tmp_path: Path) -> None:
    """An edited experiment leaves the overrides as they were: three steps are never averaged with eight."""
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    for seed, steps in ((1, 8), (2, 3), (3, 8)):
        reconfigured(folder / f"variant-lora_kl_seed-{seed}", ppo={"steps": steps, "lr": 0.1})
    found = load([folder])
    assert [row.seeds for row in found.trained] == [(1, 3)]
    assert [(run.name, differing) for run, differing in found.unlike] == [
        ("variant-lora_kl_seed-2", ["ppo.steps=3 (there: 8)"])
    ]
    told = [text for text in warnings(found) if "is left out" in text]
    assert len(told) == 1
    assert "variant-lora_kl_seed-2" in told[0]
    assert "ppo.steps=3 (there: 8)" in told[0]
    assert "ppo.steps=3 (there: 8)" in make_report([folder]).read_text()


def test_what_only_describes_a_run_does_not_part_the_seeds(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    changes: tuple[dict[str, Any], ...] = (
        {"name": "other", "guards": {"spike": 1}, "judge": {"model": "a", "client": {"base_url": "b"}}, "trainer": {}},
        {"output_dir": "x", "trainer": {"devices": 2}, "judge": {"model": "a"}},
        {"trainer": {"devices": 1, "accelerator": "gpu"}, "judge": {"model": "a"}, "report": {"title": "T"}},
    )
    for seed, change in zip((1, 2, 3), changes, strict=True):
        reconfigured(folder / f"variant-lora_kl_seed-{seed}", **change)
    assert [row.seeds for row in load([folder]).trained] == [(1, 2, 3)]
    reconfigured(folder / "variant-lora_kl_seed-3", trainer={"devices": 1, "limit_train_batches": 1})
    assert [row.seeds for row in load([folder]).trained] == [(1, 2)]


def test_a_key_that_an_older_version_lacks_does_not_part_the_seeds(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    reconfigured(folder / "variant-lora_kl_seed-3", evaluation={"difficulty": None})
    assert [row.seeds for row in load([folder]).trained] == [(1, 2)]
    path = folder / "variant-lora_kl_seed-3" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "git_commit": "newer"}))
    assert [row.seeds for row in load([folder]).trained] == [(1, 2, 3)]
    path = folder / "variant-lora_kl_seed-2" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reward_model": "reward-1"}))
    assert any("different reward models (None, reward-1)" in text for text in warnings(load([folder])))


def test_runs_moved_aside_are_no_rows(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    write_run(folder / "variant-lora_kl_seed-1" / "earlier" / "1", "lora_none", 1)
    write_run(folder / "earlier", "lora_none", 2)
    found = load([folder])
    assert [row.label for row in found.rows] == ["SFT", "variant=lora_kl"]
    assert len(found.runs) == 3
    (folder / "variant-lora_kl_seed-1" / "summary.json").unlink()
    assert {run.name: run.state for run in load([folder]).runs}["variant-lora_kl_seed-1"] == "unfinished"
    with pytest.raises(NoRunsError):
        load([folder / "variant-lora_kl_seed-1"])


def test_an_earlier_runs_length_controlled_rate_is_reported_as_what_it_is(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    for seed in (1, 2, 3):
        path = folder / f"variant-lora_kl_seed-{seed}" / "summary.json"
        summary = json.loads(path.read_text())
        old = {**summary["metrics"], "eval/length_controlled_win_rate": 0.4}
        path.write_text(json.dumps({**summary, "metrics": old}))
    table = main_table(load([folder]))
    assert "length-adjusted win rate (%)" in table.header
    assert not any("length-controlled" in name for name in table.header)
    asked = load([folder])
    asked = replace(asked, layout={"columns": ["eval/win_rate", "eval/length_controlled_win_rate"]})
    assert main_table(asked).header[-1] == "length-adjusted win rate (%)"


DAMAGED = [
    ("metrics.jsonl", b'17\n{"a": 1}\n{"step": "x"}\n"text"\n', ""),
    ("samples.jsonl", b'3\n{"prompt": 5, "step": 1}\n{"step": 1}\n', ""),
    ("outcomes.jsonl", b'{"step": 50, "win": "abc"}\n[]\n', ""),
    ("summary.json", b'{"metr', "summary.json cannot be read"),
    ("summary.json", b"\xff\x00", "summary.json cannot be read"),
    ("summary.json", b"[1]", "summary.json holds list"),
    ("summary.json", b'{"metrics": 3}', "summary.json: metrics is 3"),
    ("summary.json", b'{"metrics": {"eval/win_rate": "a"}}', "summary.json: eval/win_rate is 'a'"),
    ("failed.json", b"{", ""),
]


@pytest.mark.parametrize(("name", "content", "said"), DAMAGED)
def test_damaged_files_are_named_and_the_rest_is_reported(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    (folder / "variant-lora_kl_seed-1" / name).write_bytes(content)
    page = make_report([folder]).read_text(encoding="utf-8")
    assert len(load([folder]).rows[1].runs) == (2 if said else 3)
    found = next(run for run in load([folder]).runs if run.name == "variant-lora_kl_seed-1")
    assert said in found.reason
    assert not said or f"variant-lora_kl_seed-1 failed: {said}" in html.unescape(page)
    plan = {"runs": [{"folder": run.name, "overrides": []} for run in load([folder]).runs]}
    (folder / "plan.json").write_text(json.dumps(plan))
    state = next(run for run in states(folder) if run.folder.name == "variant-lora_kl_seed-1")
    assert (state.state, said in state.reason) == ("failed" if said else "done", True)


@pytest.mark.parametrize("content", [b'{"metrics"', b"", b"17", b'{"runs": 3}', b'{"runs": [3]}'])
def test_a_damaged_plan_is_one_sentence(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    (folder / "plan.json").write_bytes(content)
    assert len(load([folder]).finished) == 3
    monkeypatch.setattr(sys, "argv", ["rlhf-status", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        status()
    assert stopped.value.code == 2
    assert "plan.json" in capsys.readouterr().err


def test_a_report_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", {"title": "Überblick", "labels": {"lora_kl": "β = 1"}}, ["lora_kl"])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", "from rlhf.report.cli import main; main()", str(folder)]
    made = subprocess.run(command, env=environment, capture_output=True)
    assert made.returncode == 0, made.stderr.decode()
    assert "Überblick" in (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "β = 1" in (folder / "report" / "table.md").read_text(encoding="utf-8")


def test_every_text_file_is_opened_with_its_encoding() -> None:
    for path in sorted((root() / "rlhf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                assert any(word.arg == "encoding" for word in node.keywords), f"{path}:{node.lineno}"


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text, in the locale's encoding unless it names another."""
    called = call.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
    if name in ("read_text", "write_text"):
        return len(call.args) == (name == "write_text")
    if name != "open" or owner in ("gzip", "os", "cls", "FinishedRun"):
        return False
    mode = call.args[0 if owner else 1 :][:1]
    return not (mode and "b" in ast.unparse(mode[0]))


def test_a_clean_sweep_has_no_warnings(sweep: Sweep) -> None:
    assert warnings(sweep) == []


# -- tables ------------------------------------------------------------------------------------------------------------

TABLE = Table(
    ["row", "rate (%)", "gap", "kind"],
    [["a_b & c", Number(31.25, 1.5), Interval(-1.25, 0.5, 2), "x"], ["d|e", Number(-0.5, math.nan), "–", "±"]],
    "50 % of it.",
)


def test_markdown() -> None:
    assert TABLE.markdown() == (
        "| row | rate (%) | gap | kind |\n| --- | ---: | ---: | --- |\n"
        "| a_b & c | 31.2 ± 1.5 | −1.25 to +0.50 | x |\n| d\\|e | −0.5 | – | ± |\n\n50 % of it.\n"
    )


def test_csv() -> None:
    assert TABLE.csv() == (
        "row,rate (%),rate (%) se,gap low,gap high,kind\na_b & c,31.25,1.5,-1.25,0.5,x\nd|e,-0.5,,,,±\n"
    )
    assert Table(["a", "b"], []).csv() == "a,b\n"


def test_latex() -> None:
    assert TABLE.latex() == (
        "\\begin{table}\n\\centering\n\\caption{50 \\% of it.}\n\\begin{tabular}{lrrl}\n\\toprule\n"
        "row & rate (\\%) & gap & kind \\\\\n\\midrule\n"
        "a\\_b \\& c & 31.2 $\\pm$ 1.5 & $-$1.25 to +0.50 & x \\\\\nd|e & $-$0.5 & -- & $\\pm$ \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def test_main_table_shows_what_is_there_or_what_is_asked_for(sweep: Sweep, tmp_path: Path) -> None:
    table = main_table(sweep)
    assert table.header[:5] == ["row", "seeds", "win rate (%)", "judge SE (points)", "true KL (nats per token)"]
    assert str(table.rows[0][1]) == "–"
    assert re.fullmatch(r"\d\d\.\d ± \d\.\d", str(table.rows[1][2]))
    asked = write_sweep(tmp_path / "s", {"columns": ["eval/factual_precision", "eval/facts_per_response"]}, ["lora_kl"])
    chosen = load([asked])
    assert main_table(chosen).header == ["row", "seeds", "factual precision (%)", "facts per response"]


def test_comparisons_are_one_family(sweep: Sweep) -> None:
    found = comparisons(sweep, sweep.rows[2], ["eval/win_rate"])
    assert [item.row.label for item in found] == ["SFT", "variant=full_none", "variant=lora_none"]
    assert [item.difference.verdict for item in found][1:] == ["higher", "not distinguishable"]
    assert found[1].need is None
    assert found[2].need is not None


# -- figures, page and command -----------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects what a page loads or links to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


LAYOUT = {
    "title": "A <made-up> study",
    "baseline": "lora_kl",
    "labels": {"lora_kl": "LoRA, KL", "full_none": "full, none"},
    "notes": "Just a test.",
    "figures": [
        {"name": "curve", "title": "Win rate", "kind": "curve", "x": "step", "y": "eval/win_rate"},
        {"name": "path", "title": "Path", "kind": "path", "x": "eval/true_kl", "y": "eval/win_rate"},
        {"name": "root", "kind": "sqrt_kl", "y": ["eval/reward", "eval/gold_utility"], "rows": ["lora_kl"]},
        {"name": "nothing", "kind": "curve", "y": "eval/absent"},
    ],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report([write_sweep(tmp_path_factory.mktemp("report") / "s", LAYOUT)]).parent


def test_every_file_is_there(report: Path) -> None:
    figures = [f"figures/{name}.{kind}" for name in ("curve", "path", "root") for kind in ("csv", "png", "svg")]
    tables = [f"{name}.{kind}" for name in ("differences", "table") for kind in ("csv", "md", "tex")]
    files = sorted(str(path.relative_to(report)) for path in report.rglob("*") if path.is_file())
    assert files == sorted([*figures, *tables, "report.html"])
    assert "| LoRA, KL | 3 |" in (report / "table.md").read_text()
    assert "Each row minus “LoRA, KL”" in (report / "differences.md").read_text()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_numbers_behind_the_figures(report: Path) -> None:
    sweep = load([report.parent])
    lines = read_csv(report / "figures" / "curve.csv")
    assert len(lines) == 3 * len(STEPS)
    row = sweep.rows[1]
    last = next(line for line in lines if line["row"] == row.label and line["step"] == "50")
    assert float(last["eval/win_rate"]) == pytest.approx(100 * np.mean(row.values("eval/win_rate")))
    assert float(last["se"]) == pytest.approx(100 * st.seed_error(row.values("eval/win_rate")))
    root = read_csv(report / "figures" / "root.csv")
    assert {line["row"] for line in root} == {"LoRA, KL"}
    assert float(root[0]["slope"]) == pytest.approx(0.6, abs=0.05)


def test_the_page_needs_nothing_beside_it(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert not re.search(r"https?://|@import|url\(", text)
    for words in ("A &lt;made-up&gt; study", "Tell me about &lt;0&gt;.", "lora_kl 50 &amp; more", "lora.r=8",
                  "9 of 9 runs are finished", "Holm", "Just a test."):  # fmt: skip
        assert words in text


def test_config_difference() -> None:
    reference = {"seed": 1, "lora": {"r": 8, "alpha": 64}, "ppo": {"steps": 50}, "logger": {"dir": "a"}}
    ours = {"seed": 2, "lora": {"r": 0}, "ppo": {"steps": 50, "lr": None}, "logger": {"dir": "b"}}
    assert config_difference(ours, reference) == ["lora.r=0", "ppo.lr=null", "lora.alpha: absent"]


def test_bare_runs_make_a_report_too(tmp_path: Path) -> None:
    """Older runs know neither overrides nor outcomes, and have no judge."""
    write_run(tmp_path / "s" / "seed-1", "lora_kl", 1)
    folder = tmp_path / "s" / "seed-1"
    summary = json.loads((folder / "summary.json").read_text())
    del summary["overrides"]
    for metrics in (summary["metrics"], summary["sft_metrics"]):
        del metrics["eval/win_rate"]
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("outcomes", "samples", "metrics"):
        (folder / f"{name}.jsonl").unlink()
    page = make_report([tmp_path / "s"], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert not (tmp_path / "out" / "differences.md").exists()
    assert "The runs have no samples" in page.read_text()


def test_a_run_that_diverged_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl", "lora_none"]) / "variant-lora_none_seed-3"
    for name, key in (("metrics", "eval/win_rate"), ("outcomes", "win")):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        broken = [{**line, key: [math.nan] * PROMPTS if name == "outcomes" else math.nan} for line in lines]
        write_lines(folder / f"{name}.jsonl", broken)
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"]["eval/win_rate"] = math.nan
    (folder / "summary.json").write_text(json.dumps(summary))
    text = make_report([tmp_path / "s"]).read_text()
    assert "variant-lora_none_seed-3 has non-finite values in eval/win_rate" in text


def test_the_command(sweep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(sweep_folder), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "variant=lora_kl" in shown
    assert "report.html" in shown
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "win_rate", "true_kl", "response_tokens", "win_rate_by_kl",
    }  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no finished run" in capsys.readouterr().err
    with pytest.raises(NoRunsError):
        load([tmp_path / "absent"])


def test_a_figure_of_no_known_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "s" / "a", "lora_kl", 1, {"figures": [{"name": "x", "y": "eval/reward", "kind": "pie"}]})
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "s")])
    assert stopped.value.code == 2
    assert "allowed: curve, path, sqrt_kl" in capsys.readouterr().err


def test_every_row_has_a_look_of_its_own() -> None:
    found = looks([str(i) for i in range(20)])
    assert len({(look.color, look.line) for look in found.values()}) == 20


def test_a_label_of_any_length_leaves_room_for_the_panel(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from rlhf.report.figure_labels import End, make_room
    from rlhf.report.figure_style import looks

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    label = "x" * 300
    make_room(figure, [[End(1, 1, label, looks([label])[label])]])
    assert axes.get_position().width > 0.3
