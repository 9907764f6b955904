"""docs/divergences.md: its commands are run, and what they say about the default is what the code does."""

import re
from pathlib import Path

import pytest

from rlhf import root
from rlhf.files import SUMMARY
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.command_line import TINY, run_in_process

PAGE = (root() / "docs" / "divergences.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split()[1:] for text in BLOCKS for line in text.splitlines() if line.startswith("rlhf ")]


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 2


@pytest.mark.slow
def test_the_pages_commands_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in COMMANDS:
        assert run_in_process(*words, *TINY, "ppo.steps=2", "ppo.eval_every=2") == 0
    folders = [path.parent for path in Path("outputs/rlhf").glob(f"*/{SUMMARY}")]
    assert len(folders) == len(COMMANDS)
    for folder in folders:
        penalties = [line["ppo/penalty"] for line in read_metrics(folder) if "ppo/penalty" in line]
        assert len(penalties) == 2
        assert penalties[0] == pytest.approx(0, abs=1e-6)  # the policy starts at the reference
        assert penalties[1] > 0
