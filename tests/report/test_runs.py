"""Reading of runs for the report: rows and seeds, warnings, damaged files."""

import html
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import NoRunsError
from rlhf.report.checks import warnings
from rlhf.report.cli import make_report
from rlhf.report.results import main_table
from rlhf.report.rows import Row
from rlhf.report.runs import Sweep, label, load
from rlhf.sweep.states import states
from rlhf.sweep.status import status
from tests.helpers.made_up_sweeps import PROMPTS, STEPS, write_lines, write_run, write_sweep


def ppo_seeds(row: Row) -> tuple[int, ...]:
    return tuple(run.seeds.ppo for runs in row.replicates.values() for run in runs)


def test_rows_are_runs_that_differ_in_their_seed(sweep: Sweep) -> None:
    assert [(row.label, ppo_seeds(row)) for row in sweep.rows] == [
        ("SFT", ()),
        ("variant=full_none", (1, 2, 3)),
        ("variant=lora_kl", (1, 2, 3)),
        ("variant=lora_none", (1, 2, 3)),
    ]
    for row in sweep.rows:
        for metric in ("eval/win_rate", "eval/factual_precision", "eval/response_tokens"):
            outcomes = row.outcomes(metric)
            assert outcomes is not None
            assert outcomes.shape == (max(1, len(row.replicates)), PROMPTS)
            assert outcomes.mean(axis=1) == pytest.approx(row.values(metric))


def test_labels_are_taken_from_the_layout() -> None:
    names = {"variant=kl": "KL", "none": "no penalty", "variant=kl, lora.r=8": "both"}
    assert label(["variant=kl"], names) == "KL"
    assert label(["divergence=none", "lora.r=4"], names) == "no penalty, lora.r=4"
    assert label(["variant=kl", "lora.r=8"], names) == "both"
    assert label([], names) == "PPO"
    assert label(["debug=quick", "variant=kl"], names, ["debug=quick"]) == "KL"
    assert label(["debug=quick", "lora.r=8", "variant=kl"], {"lora.r=8, variant=kl": "both"}, ["debug=quick"]) == "both"
    assert label(["debug=quick"], names, ["debug=quick"]) == "PPO"


def test_rows_are_called_by_what_varies(tmp_path: Path) -> None:
    """Overrides that all runs have stand once above the table of runs, and in no label."""
    for variant in ("lora_kl", "lora_none"):
        for seed in (1, 2):
            overrides = ["ppo.steps=50", f"variant={variant}", "debug=quick", f"seed={seed}"]
            write_run(tmp_path / "sweep" / f"{variant}-{seed}", variant, seed, overrides=overrides)
    found = load([tmp_path / "sweep"])
    assert [row.label for row in found.trained] == ["variant=lora_kl", "variant=lora_none"]
    page = make_report([tmp_path / "sweep"]).read_text()
    assert "All runs: <code>ppo.steps=50 debug=quick</code>" in page
    assert page.count("debug=quick") == 1


def test_repeated_steps_and_torn_lines_are_handled(tmp_path: Path) -> None:
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
    for words in ("“variant=c” failed: out of memory", "1 run not finished: “variant=d”", "not begun: “variant=e”",
                  f"left out: {folder / 'again'}", "“variant=lora_none” has non-finite values in ppo/reward",
                  "50 % of its sampled responses", "Every row has one seed only",
                  "different commits (abc, def+)", "uncommitted changes (def+)", "of torch (2.13, 2.14)"):  # fmt: skip
        assert words in text


def reconfigured(folder: Path, **config: Any) -> None:
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "config": {**summary["config"], **config}}))


def test_runs_of_other_configurations_are_no_seeds_of_a_row(tmp_path: Path) -> None:
    """Editing an experiment does not change the overrides: runs of three and of eight steps must not be averaged."""
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    for seed, steps in ((1, 8), (2, 3), (3, 8)):
        reconfigured(folder / f"variant-lora_kl_seed-{seed}", ppo={"steps": steps, "lr": 0.1})
    found = load([folder])
    assert [ppo_seeds(row) for row in found.trained] == [(1, 3)]
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
        {"name": "other", "guards": {"spike": 1}, "judge": {"client": {"name": "a", "base_url": "b"}}, "trainer": {}},
        {"output_dir": "x", "trainer": {"devices": 2}, "judge": {"client": {"name": "a", "retries": 2, "cache": "c"}}},
        {"trainer": {"accelerator": "gpu"}, "judge": {"client": {"name": "a"}}, "report": {"title": "T"}},
    )
    for seed, change in zip((1, 2, 3), changes, strict=True):
        reconfigured(folder / f"variant-lora_kl_seed-{seed}", **change)
    assert [ppo_seeds(row) for row in load([folder]).trained] == [(1, 2, 3)]
    reconfigured(folder / "variant-lora_kl_seed-3", trainer={"devices": 1, "limit_train_batches": 1})
    assert [ppo_seeds(row) for row in load([folder]).trained] == [(1, 2)]


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"trainer": {"_target_": "lightning.pytorch.Trainer", "deterministic": True, "benchmark": False}},
    {"trainer": {"_target_": "lightning.Trainer", "detect_anomaly": True, "callbacks": None}},
    {"ppo": {"steps": 8, "checkpoint_every": 5}, "sft": {"log_every": 2}},
    {"generation": {"cuda_graphs": "never"}},
    {"model": {"name": "another name of the same"}},
]


@pytest.mark.parametrize("change", WITHOUT_EFFECT, ids=str)
def test_replicates_may_differ_in_what_is_no_part_of_a_runs_identity(tmp_path: Path, change: dict[str, Any]) -> None:
    """All runs are of one commit, so that a key which only one of them has would count."""
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    same = {"trainer": {"_target_": "lightning.Trainer"}, "ppo": {"steps": 8}, "sft": {}, "generation": {}, "model": {}}
    for seed in (1, 2, 3):
        reconfigured(folder / f"variant-lora_kl_seed-{seed}", **{**same, **(change if seed == 3 else {})})
    assert [ppo_seeds(row) for row in load([folder]).trained] == [(1, 2, 3)]
    reconfigured(folder / "variant-lora_kl_seed-3", trainer={"_target_": "mine.Trainer"})
    assert [ppo_seeds(row) for row in load([folder]).trained] == [(1, 2)]


def test_a_key_that_an_older_version_lacks_does_not_part_the_seeds(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    reconfigured(folder / "variant-lora_kl_seed-3", evaluation={"difficulty": None})
    assert [ppo_seeds(row) for row in load([folder]).trained] == [(1, 2)]
    path = folder / "variant-lora_kl_seed-3" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "git_commit": "newer"}))
    assert [ppo_seeds(row) for row in load([folder]).trained] == [(1, 2, 3)]
    path = folder / "variant-lora_kl_seed-2" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "reward_model": "reward-1"}))
    assert any("different reward models (None, reward-1)" in text for text in warnings(load([folder])))


def test_a_misspelt_key_of_the_layout_is_warned_of(tmp_path: Path) -> None:
    for name, layout in (("right", {"pair_seeds": True, "notes": "n"}), ("wrong", {"pair_seed": True, "notes": "n"})):
        told = warnings(load([write_sweep(tmp_path / name, layout, ["lora_kl"])]))
        assert [text.partition(" has no effect; allowed: title, ")[0] for text in told] == ["report.pair_seed"] * (
            name == "wrong"
        )


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
    # the figures read all of these files but those of a summary, whose run is left out
    layout = {"figures": []} if name == "summary.json" else None
    folder = write_sweep(tmp_path / "s", layout, variants=["lora_kl"])
    (folder / "variant-lora_kl_seed-1" / name).write_bytes(content)
    page = make_report([folder]).read_text(encoding="utf-8")
    assert len(load([folder]).rows[1].runs) == (2 if said else 3)
    found = next(run for run in load([folder]).runs if run.name == "variant-lora_kl_seed-1")
    assert said in found.reason
    assert not said or f"failed: {said}" in html.unescape(page)
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


def test_a_clean_sweep_has_no_warnings(sweep: Sweep) -> None:
    assert warnings(sweep) == []


def test_what_another_method_reads_is_no_difference(tmp_path: Path) -> None:
    """DPO's defaults may be edited between two PPO runs; PPO's may not."""
    for seed, dpo, ppo in ((1, 0.1, 1), (2, 0.2, 1), (3, 0.2, 2)):
        config = {"seed": seed, "dpo": {"beta": dpo}, "ppo": {"gamma": ppo}}
        write_run(tmp_path / "sweep" / str(seed), "lora_kl", seed, config=config)
    found = load([tmp_path / "sweep"])
    assert [run.seeds.ppo for run in found.rows[1].runs] == [1, 2]
    assert [(run.seeds.ppo, told) for run, told in found.unlike] == [(3, ["ppo.gamma=2 (there: 1)"])]
