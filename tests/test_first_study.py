"""docs/first_study.md: its files are written, and its commands are run at the smallest size."""

import re
import shlex
from pathlib import Path

import pytest

import rlhf
from rlhf import root
from rlhf.files import SUMMARY
from tests.helpers.command_line import TINY, run_in_process

pytestmark = pytest.mark.slow
PAGE = (root() / "docs" / "first_study.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:] for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]
SMALL = [word for word in TINY if word != "ppo.steps=3"]


def test_the_tutorial_ends_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(".")
    for _, text in BLOCKS:
        named = re.match(r"(?:# @package _global_\n)?# (mine/\S+)\n", text)
        if named:
            Path(named[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(named[1]).write_text(text)
    quick, rewarded, listed, study = COMMANDS
    assert run_in_process(*quick, *TINY) == 0
    assert run_in_process(*rewarded, *TINY) == 0
    # one replicate and two penalties are enough to see that it runs
    few = ["replicate=1", "divergence=none,kl", "ppo.steps=1", "ppo.eval_every=1", "hydra/launcher=basic"]
    assert run_in_process(*listed, *SMALL, *few) == 0
    assert not Path("outputs/brevity").exists()
    assert run_in_process(*study, *SMALL, *few) == 0
    assert len(list(Path("outputs/brevity").glob(f"*/{SUMMARY}"))) == 2
    assert Path("outputs/brevity/report/report.html").exists()
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "rlhf.results" in text]
    exec(code, {"rlhf": rlhf})
    assert len(rlhf.results("outputs/brevity").runs) == 2
