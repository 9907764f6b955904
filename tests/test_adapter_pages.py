"""docs/adapters.md and docs/references.md: their commands are checked as a run would check them; sweeps are planned."""

import re
from pathlib import Path

import pytest

from rlhf import root
from tests.helpers.command_line import run_in_process
from tests.helpers.composed_config import compose_and_check

COMMANDS = [
    line.split()[1:]
    for page in ("adapters.md", "references.md")
    for block in re.findall(r"^```bash\n(.*?)^```$", (root() / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] != "-m"], ids=" ".join)
def test_a_command_of_the_pages_would_run(words: list[str]) -> None:
    compose_and_check(*words)


@pytest.mark.long
@pytest.mark.parametrize(("name", "count"), [("reference", 24), ("lora_regret", 84)], ids=["reference", "lora_regret"])
def test_a_study_of_the_pages_is_planned(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert ["-m", f"experiments={name}"] in COMMANDS
    monkeypatch.chdir(tmp_path)
    assert run_in_process("-m", f"experiments={name}", "hydra/launcher=basic", "dry_run=true") == 0
    assert f"0 of {count} runs done" in capfd.readouterr().out
