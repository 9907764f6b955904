"""The model card: its example runs as it stands, and it shows evidence and nothing of this machine."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard

from rlhf.finished.export import cli
from rlhf.finished.export.card import fenced, shareable
from rlhf.report.statistics import mean_of
from rlhf.tracking.summary import environment
from tests.helpers.finished_runs import finished_outputs
from tests.helpers.made_up_sweeps import write_lines

WINS = [[1.0, 0.0] * 10, [1.0, 1.0, 0.0, 1.0] * 5]  # of the SFT model and of the policy


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    outputs = tmp_path_factory.mktemp("work") / "outputs"
    made = finished_outputs(outputs, f"+scorer.file=json:{Path.home()}/deep/file.json")
    steps = (0, 7)
    write_lines(made.ppo / "outcomes.jsonl", [{"step": s, "win": won} for s, won in zip(steps, WINS, strict=True)])
    lines = [
        {"step": step, "prompt": f"w5 w{i} w6", "response": f"w{i} ``` w{step}"} for step in steps for i in range(3, 9)
    ]
    write_lines(made.ppo / "samples.jsonl", lines)
    path = made.ppo / "summary.json"
    guards = {"large_kl": {"count": 2, "first_step": 5, "message": "the KL averaged 0.9"}}
    summary = json.loads(path.read_text())
    summary["metrics"]["eval/win_rate"] = float(np.mean(WINS[1]))
    summary["sft_metrics"]["eval/win_rate"] = float(np.mean(WINS[0]))
    path.write_text(json.dumps({**summary, "guards": guards}))
    return made


def exported(run: Path, folder: Path, *options: str) -> str:
    """The text of the card of an exported run."""
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main([str(run), str(folder), *options])
    return ModelCard.load(folder / "README.md").text


@pytest.mark.parametrize(("name", "options"), [("ppo", []), ("ppo", ["--adapter"]), ("sft", []), ("reward", [])])
def test_the_example_runs_as_it_stands(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str]
) -> None:
    card = exported(getattr(runs, name), tmp_path / "my-model", *options)
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    if name == "reward":
        assert np.isfinite(float(said.getvalue()))
    else:
        assert "max_new_tokens=6, do_sample=False" in code
        assert said.getvalue().strip().startswith("w")


def test_the_card_shows_intervals_samples_format_limits_and_licence(runs: SimpleNamespace, tmp_path: Path) -> None:
    card = exported(runs.ppo, tmp_path / "my-model")
    cells = [f"{100 * m.mean:.1f} ({100 * m.low:.1f} to {100 * m.high:.1f})" for m in
             (mean_of(np.array([won])) for won in WINS)]  # fmt: skip
    assert f"| win rate (%) | {cells[0]} | {cells[1]} |" in card
    assert "```\nw5 {instruction} w6\n```" in card
    assert "The first 3 instructions of the evaluation: a fixed rule" in card
    assert card.count("This model:") == 3
    assert "````\nw3 ``` w7\n````" in card  # a text with a fence in it
    for words in ("## Limits", "This is one training run", "the guard large_kl (from step 5 on): the KL averaged 0.9",
                  "## Licence", "Nobody has stated one"):  # fmt: skip
        assert words in card, words
    assert "`mit`." in exported(runs.ppo, tmp_path / "other", "--license", "mit")


def test_the_card_names_a_function_that_rewarded_and_no_judge_where_there_was_none(tmp_path: Path) -> None:
    own = ["scorer=function", "scorer.function=mine.parts.short", "judge=none"]
    made = finished_outputs(tmp_path / "outputs", *own).ppo
    summary = json.loads((made / "summary.json").read_text())
    summary["config"]["data"] |= {"_target_": "rlhf.data.hub.Hub", "sft": "mine/animals.jsonl"}
    (made / "summary.json").write_text(json.dumps(summary))
    card = exported(made, tmp_path / "card")
    assert "against the score\nof `mine.parts.short`, with the divergence" in card
    assert "temperature 0.0.\n" in card
    assert "NoJudge" not in card
    assert "| data | local files |" in card


def test_the_card_says_what_computed_the_run_and_what_moved_its_reference(
    runs: SimpleNamespace, tmp_path: Path
) -> None:
    card = exported(runs.ppo, tmp_path / "plain")
    assert f"Computed on: {environment()['processor']}." in card
    assert "Continued" not in card
    assert "from the SFT model" in card
    shutil.copytree(runs.ppo, runs.ppo.with_name("continued"))
    path = runs.ppo.with_name("continued") / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"]["reference"] = {"_target_": "rlhf.stages.reference.EMA", "decay": 0.75}
    entries = [{"from_step": step, "device": "cpu", "threads": 1 + step} for step in (0, 4)]
    path.write_text(json.dumps({**summary, "sessions": entries}))
    card = exported(path.parent, tmp_path / "continued")
    assert "Continued from step 4 on with threads=5 instead of 1." in card
    assert "from the reference of `rlhf.stages.reference.EMA`" in card
    assert "decay: 0.75" in card
    assert "name: gae" in card  # the estimate of advantages


def test_no_place_of_this_machine_is_in_any_card(runs: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("ppo", "sft", "reward", "full"):
        card = exported(getattr(runs, name), tmp_path / name)
        for place in (str(tmp_path), str(runs.ppo), str(Path.home()), str(Path.cwd()), "/tmp", "/home"):
            assert place not in card, (name, place)


def test_paths_inside_of_values_are_cut() -> None:
    told = {
        "a": "json:/home/me/x.json",
        "b": "rows@~/me/y.csv[:5]",
        "c": "hf://datasets/o/n/f.json",
        "d": "https://x/y/z",
    }
    assert shareable(told) == {**told, "a": "json:x.json", "b": "rows@y.csv[:5]"}
    assert fenced("a") == "```\na\n```"
