"""The chain of docs/checkpoints.md, from a released chat model to a policy that is compared with it."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf import root
from rlhf.files import SUMMARY, read_json
from rlhf.finished.chat import cli as chat
from rlhf.finished.compare import cli as compare
from rlhf.finished.export import cli as export
from tests.helpers.chat_models import save_chat_model
from tests.helpers.command_line import run_in_process

pytestmark = pytest.mark.slow
PAGE = (root() / "docs" / "checkpoints.md").read_text(encoding="utf-8")
[CHAIN] = [
    text for text in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if "ultrafeedback" in text
]


def pairs(count: int) -> list[dict[str, object]]:
    """Conversations of one question, whose longer answers are preferred."""
    rows = []
    for i in range(count):
        sides = {"chosen": f"I count {i}, {i + 1} and {i + 2}.", "rejected": f"No {i}."}
        question = {"role": "user", "content": f"Add {i}."}
        rows.append({side: [question, {"role": "assistant", "content": text}] for side, text in sides.items()})
    return rows


def test_every_command_of_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand on the page: nothing is fine-tuned before PPO, and what is exported can be loaded by anybody."""
    monkeypatch.chdir(tmp_path)
    save_chat_model("chatml", Path("MODEL"))
    Path("FOLDER").mkdir()
    Path("FOLDER/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(257)))
    mains = {"rlhf-compare": compare.main, "rlhf-chat": chat.main, "rlhf-export": export.main}
    said = {}
    for line in CHAIN.splitlines():
        command, *words = shlex.split(line)
        monkeypatch.setattr("sys.stdin", io.StringIO("Add 1.\n"))
        assert (run_in_process(*words) if command == "rlhf" else mains[command](words)) in (0, None)
        said[command] = capsys.readouterr().out
    policy, judge = (read_json(Path("outputs/chain", name, SUMMARY)) for name in ("policy", "judge"))
    assert policy["reward_model"] not in (None, judge.get("name"))
    assert len(list(Path("outputs/cache").glob("reward-*[0-9a-f]"))) == 2
    [sft] = Path("outputs/cache").glob("sft-*[0-9a-f]")
    assert read_json(sft / SUMMARY)["taken_from"]["name"] == "MODEL"
    assert re.search(r"\| policy@sft \|", said["rlhf-compare"])
    assert said["rlhf-chat"].startswith("> Add 1.\npolicy: ")
    assert AutoTokenizer.from_pretrained("my-model").chat_template
    AutoModelForCausalLM.from_pretrained("my-model")
