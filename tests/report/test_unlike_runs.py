"""No row mixes runs that were measured on other data or by another server, and every mean says what it lacks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.files import OUTCOMES, SUMMARY, read_lines, read_object, write_json
from rlhf.report.checks import warnings
from rlhf.report.cli import make_report
from rlhf.report.results import main_table
from rlhf.report.runs import Sweep, load
from tests.helpers.made_up_sweeps import write_lines, write_sweep


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "s", variants=["lora_kl"])


def change(run: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    summary = read_object(run / SUMMARY)
    edit(summary)
    write_json(run / SUMMARY, summary)


def counted(sweep: Sweep) -> list[int]:
    return [len(row.runs) for row in sweep.trained]


def said(sweep: Sweep, part: str) -> list[str]:
    return [text for text in warnings(sweep) if part in text]


def test_a_run_judged_by_another_server_is_left_out(folder: Path) -> None:
    for seed in (1, 2, 3):
        judge = {"client": {"base_url": f"http://{'one' if seed < 3 else 'another'}/v1", "retries": seed}}
        change(folder / f"variant-lora_kl_seed-{seed}", lambda run, to=judge: run["config"].update(judge=to))
    sweep = load([folder])
    assert counted(sweep) == [2]
    (told,) = said(sweep, "is left out")
    assert "judge.client=http://another/v1 (there: http://one/v1)" in told


def test_a_run_of_a_file_of_the_same_name_and_another_content_is_left_out(folder: Path) -> None:
    for seed in (1, 2, 3):
        files = {"data.files": "b" if seed == 3 else "a"}
        change(folder / f"variant-lora_kl_seed-{seed}", lambda run, to=files: run.update(files=to))
    sweep = load([folder])
    assert counted(sweep) == [2]
    (told,) = said(sweep, "is left out")
    assert "data.files: a file or folder of another content" in told


def test_runs_of_a_version_that_noted_no_files_are_no_others(folder: Path) -> None:
    change(folder / "variant-lora_kl_seed-3", lambda run: run.update(files={"data.files": "a"}))
    assert counted(load([folder])) == [3]


def test_a_mean_says_which_runs_it_lacks(folder: Path) -> None:
    assert not said(load([folder]), "of which it is not known")
    change(folder / "variant-lora_kl_seed-2", lambda run: run["metrics"].pop("eval/win_rate"))
    (told,) = said(load([folder]), "of which it is not known")
    assert told.startswith("“variant=lora_kl”: win rate")
    assert "without “variant=lora_kl, seed=2”" in told


@pytest.mark.parametrize("fault", ["the last line is cut", "a line of another evaluation", "no file"])
def test_results_per_instruction_count_only_if_they_are_those_of_the_figure(folder: Path, fault: str) -> None:
    assert any("95 % interval" in name for name in main_table(load([folder])).header)
    path = folder / "variant-lora_kl_seed-2" / OUTCOMES
    lines = read_lines(path)
    if fault == "the last line is cut":
        text = path.read_text()
        path.write_text(text[: text.rstrip().rindex("\n") + 40])
    elif fault == "no file":
        path.unlink()
    else:
        write_lines(path, [*lines[:-1], {**lines[-1], "win": [1.0 - value for value in lines[-1]["win"]]}])
    sweep = load([folder])
    assert sweep.trained[0].outcomes("eval/win_rate") is None
    (told,) = said(sweep, OUTCOMES)
    assert "“variant=lora_kl, seed=2”" in told
    assert "win rate" in told
    assert json.loads((folder / "variant-lora_kl_seed-2" / SUMMARY).read_text())["metrics"]["eval/win_rate"] > 0


def test_a_run_continued_by_another_commit_is_named(folder: Path) -> None:
    assert not said(load([folder]), "continued by another")
    change(folder / "variant-lora_kl_seed-2", lambda run: run.update(commits=["one", "two"]))
    (told,) = said(load([folder]), "continued by another")
    assert told == "1 run begun by one commit and continued by another: “variant=lora_kl, seed=2”."
    assert said(load([folder]), "different commits")


def test_no_table_or_figure_of_an_earlier_report_lies_beside_the_present_one(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", {"baseline": "variant=lora_kl"}, variants=["lora_kl", "lora_none"])
    report = make_report([folder]).parent
    (report / "mine.csv").write_text("kept\n")
    old = {path.name for path in report.rglob("*.csv")}
    for run in folder.glob("*variant-lora_none*"):
        shutil.rmtree(run)
    assert make_report([folder]).parent == report
    gone = old - {path.name for path in report.rglob("*.csv")}
    assert {"differences.csv"} <= gone
    assert "mine.csv" not in gone
    assert not (report / "differences.md").exists()
    assert {path.stem for path in (report / "figures").iterdir()} == {
        path.stem for path in (report / "figures").glob("*.svg")
    }
