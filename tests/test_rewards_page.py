"""docs/rewards.md: its commands compose and are accepted, and its table lists what is refused."""

import json
import re
import shlex
from pathlib import Path

import pytest

from rlhf import root
from rlhf.errors import ConfigError
from tests.helpers.composed_config import compose_and_check

PAGE = (root() / "docs" / "rewards.md").read_text().replace("\\\n", " ")
COMMANDS = [shlex.split(line.partition(" #")[0])[1:] for line in PAGE.splitlines() if line.startswith("rlhf ")]
REFUSED = [
    ["scorer=ensemble", "reward.average_of=2"],
    ["reward.average_of=2", "reward.from=a/b"],
    ["scorer=ensemble", "lora@reward.lora=none"],
    ["scorer=ensemble", "model@reward.model=smollm2_135m"],
    ["reward.margin_coef=1"],
    ["ppo.ptx_coef=1", "ppo=as_published"],
    ["ppo.ptx_coef=1", "trainer=fsdp", "trainer.devices=2"],
    ["ppo.ptx_batch_size=8"],
]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files and the function that the page's commands name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checks.py").write_text(
        "def right(prompts, responses, answer):\n    return [0.0] * len(answer)\n"
    )
    rows = {
        "rows.jsonl": {"instruction": "a", "output": "b"},
        "problems.jsonl": {"instruction": "a", "answer": "b"},
        "scored.jsonl": {
            "instruction": "a",
            "chosen": "b",
            "rejected": "c",
            "score_chosen": 3.0,
            "score_rejected": 1.0,
        },
        "texts.jsonl": {"text": "a b"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_is_accepted(command: list[str], mine: Path) -> None:
    words = [word.replace("FOLDER", str(mine)) for word in command]
    compose_and_check(*words, *(["judge=none"] if "data=hub" in words else []))


@pytest.mark.parametrize("chosen", REFUSED, ids=" ".join)
def test_what_the_page_says_is_refused_is_refused(chosen: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_and_check(*chosen)
    assert "\n" not in str(refused.value)
    assert "allowed: " in str(refused.value)


def test_the_table_has_a_row_for_each() -> None:
    table = PAGE[PAGE.index("## What is refused") :]
    assert len(re.findall(r"^\| .*\| .*\|$", table, re.MULTILINE)) - 1 == len(REFUSED)
