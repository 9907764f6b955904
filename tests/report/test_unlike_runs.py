"""No row mixes runs that were measured on other data or by another server, and every mean says what it lacks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf.files import EVALUATIONS, OUTCOMES, SUMMARY, read_lines, read_object, write_json
from rlhf.report.checks import warnings
from rlhf.report.cli import main, make_report
from rlhf.report.findings import findings
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


def continued(folder: Path, **other: Any) -> list[str]:
    """What is said of a run that was continued in an environment with `other` facts than it began with."""
    change(folder / "variant-lora_kl_seed-2", lambda run: run.update(sessions=[
        {"from_step": 0, "threads": 1, "versions": {"torch": "2.13"}, "git_commit": "abc"},
        {"from_step": 4, "threads": 1, "versions": {"torch": "2.13"}, "git_commit": "abc", **other},
    ]))  # fmt: skip
    return said(load([folder]), "Continued with another")


def test_a_run_continued_with_something_else_is_named(folder: Path) -> None:
    assert not said(load([folder]), "Continued with another")
    assert continued(folder, git_commit="two", versions={"torch": "2.14"}) == [
        "Continued with another commit and version of torch than begun: “variant=lora_kl, seed=2”."
    ]
    assert said(load([folder]), "different commits (abc, two)")
    assert said(load([folder]), "different versions of torch (2.13, 2.14)")
    assert continued(folder, threads=2) == [
        "Continued with another number of threads than begun: “variant=lora_kl, seed=2”."
    ]
    assert "commit abc." in "".join(findings(load([folder]), [], None))


def test_an_earlier_versions_run_continued_by_another_commit_is_named(folder: Path) -> None:
    change(folder / "variant-lora_kl_seed-2", lambda run: run.update(commits=["one", "abc"]))
    assert said(load([folder]), "Continued with another commit than begun: “variant=lora_kl, seed=2”.")
    assert said(load([folder]), "different commits (abc, one)")


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ({"device": "cuda"}, "devices (cpu, cuda)"), ({"processor": "B"}, "processors (A, B)"),
        ({"threads": 2}, "numbers of threads (1, 2)"), ({"processes": 2}, "numbers of processes (1, 2)"),
        ({"deterministic": True}, "values of trainer.deterministic (False, True)"),
    ],
)  # fmt: skip
def test_runs_that_were_not_computed_alike_are_no_table_without_a_word(
    folder: Path, fact: dict[str, Any], words: str
) -> None:
    alike = {"device": "cpu", "processor": "A", "threads": 1, "processes": 1, "deterministic": False}
    for run in folder.iterdir():
        change(run, lambda summary: summary.update(alike))
    assert not said(load([folder]), "were made with different")
    change(folder / "variant-lora_kl_seed-2", lambda summary: summary.update(fact))
    assert said(load([folder]), "were made with different") == [f"The runs were made with different {words}."]


@pytest.mark.parametrize(("key", "model"), [("sft_model", "SFT"), ("reward_model", "reward")])
def test_models_that_were_not_computed_alike_are_named(folder: Path, key: str, model: str) -> None:
    for number, run in enumerate(sorted(folder.iterdir())):
        built = folder.parent / "cache" / f"model-{number % 2}"
        built.mkdir(parents=True, exist_ok=True)
        (built / SUMMARY).write_text(json.dumps({"metrics": {}, "versions": {"torch": f"2.{number % 2}"}}))
        change(run, lambda summary, name=built.name: summary.update({key: name}))
    assert said(load([folder]), "models of the runs") == [
        f"The {model} models of the runs were made with different versions of torch (2.0, 2.1)."
    ]


def test_evaluations_that_were_not_computed_alike_are_named(folder: Path) -> None:
    """The runs were trained alike, and one of them is measured anew with another version."""
    run = folder / "variant-lora_kl_seed-2"
    shutil.copytree(run, run / EVALUATIONS / "anew")
    write_json(run / EVALUATIONS / "shown.json", {"evaluation": "anew"})
    assert not said(load([folder]), "made with different")
    change(run / EVALUATIONS / "anew", lambda summary: summary.update(versions={"torch": "2.14"}))
    assert said(load([folder]), "made with different") == [
        "The evaluations were made with different versions of torch (2.13, 2.14)."
    ]


def test_terminal_and_notebook_warn_as_the_page_does(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rlhf.results(folder)
    main([str(folder)])
    assert not caplog.messages
    assert "different versions" not in capsys.readouterr().out
    change(folder / "variant-lora_kl_seed-2", lambda run: run.update(versions={"torch": "2.14"}))
    change(folder / "variant-lora_kl_seed-3", lambda run: run["config"].update(lora={"r": 9}))
    rlhf.results(folder)
    main([str(folder)])
    shown = " ".join(capsys.readouterr().out.split())
    for text, words in ((caplog.text, "is left out"), (caplog.text, "of torch (2.13, 2.14)"),
                        (shown, "is left out"), (shown, "of torch (2.13, 2.14)")):  # fmt: skip
        assert words in text


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
