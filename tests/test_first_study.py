"""docs/first_study.md: its files are written, and its commands are run at the smallest size."""

import io
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rlhf
from rlhf import root
from rlhf.files import SUMMARY, read_json
from rlhf.finished.chat import cli as chat
from rlhf.finished.compare import cli as compare
from rlhf.finished.export import cli as export
from tests.helpers.command_line import TINY, run_in_process

pytestmark = pytest.mark.slow
PAGE = (root() / "docs" / "first_study.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
OF_THE_FARM = [word for word in TINY if word.startswith("data")]
SMALL = [word for word in TINY if word not in (*OF_THE_FARM, "ppo.steps=3", "ppo.eval_every=3")]


def called(main: Callable, words: list[str]) -> int:
    """The exit code of a command that trains nothing."""
    try:
        main(words)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_the_tutorial_ends_in_a_report_and_in_policies_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    # the commands themselves let `mine` be imported from the current folder
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".")])
    for _, text in BLOCKS:
        named = re.match(r"(?:# @package _global_\n)?# (mine/\S+)\n", text)
        if named:
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(text)
    quick, made, listed, study, evaluated, compared, talked, exported = COMMANDS
    assert run_in_process(*quick[1:], *TINY, "stage=sft") == 0  # other tests run all stages
    # 1. The data and the study. One replicate and one step are enough to see that it runs.
    assert made == ["python", "mine/make_data.py"]
    exec(Path("mine/make_data.py").read_text(), {})
    assert len(Path("mine/animals.jsonl").read_text().splitlines()) == 200
    few = ["replicate=1", "ppo.steps=1", "ppo.eval_every=1"]
    assert run_in_process(*listed[1:], *SMALL, *few) == 0
    assert not Path("outputs/brevity").exists()
    capsys.readouterr()
    assert run_in_process(*study[1:], *SMALL, *few) == 0
    assert Path("outputs/brevity/report/report.html").exists()
    assert "outputs/brevity/report/report.html" in capsys.readouterr().out.splitlines()
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "rlhf.results" in text]
    exec(code, {"rlhf": rlhf})
    assert len(rlhf.results("outputs/brevity").runs) == 2
    # 2. The finished policies, by another judge; then under the names that the page's own runs have.
    assert run_in_process(*evaluated[1:], *SMALL, *few) == 0
    assert "win rate" in Path("outputs/judged/report/table.md").read_text()
    assert "win rate" not in Path("outputs/brevity/report/table.md").read_text()
    for divergence in ("none", "capped_kl"):
        (folder,) = Path("outputs/brevity").glob(f"*divergence-{divergence}_*")
        folder.rename(f"outputs/brevity/divergence-{divergence}_replicate-1")
    (path,) = Path("outputs/brevity/divergence-none_replicate-1").glob(f"evaluations/*/{SUMMARY}")
    assert "eval/win_rate" in read_json(path)["metrics"]
    one = ["stage=evaluate", "policy=outputs/brevity/divergence-none_replicate-1", "judge=more_words"]
    assert run_in_process("--config-dir", "mine/conf", *one) == 0
    assert "  rlhf-report outputs/brevity/divergence-none_replicate-1" in capsys.readouterr().out.splitlines()
    assert called(compare.main, compared[1:]) == 0
    assert len(list(Path("outputs/comparisons").glob("*/comparison.md"))) == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("Describe a fox.\n"))
    assert called(chat.main, talked[1:]) == 0
    assert "divergence-capped_kl_replicate-1: " in capsys.readouterr().out
    assert called(export.main, exported[1:]) == 0
    assert Path("brief-model/README.md").exists()
