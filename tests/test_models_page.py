"""docs/models.md: its table is computed from the published shapes, and its commands are run with small relatives."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import root
from rlhf.models.memory import Work, estimate
from rlhf.models.sizes import Sizes
from tests.helpers.command_line import run_in_process
from tests.helpers.composed_config import composed_settings
from tests.helpers.hub_rows import assistant, user
from tests.helpers.published_models import PUBLISHED, publish_relative

PAGE = (root() / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
COMMANDS = [shlex.split(line)[1:] for line in PAGE.replace("\\\n", " ").splitlines() if line.startswith("rlhf ")]
ADAPTERS = ["lora=r16_all", "lora@reward.lora=r16_all", "lora@sft.lora=r16_all"]
COLUMNS = [ADAPTERS, [*ADAPTERS, "quantization=nf4"], ["lora=none", "lora@reward.lora=none"]]
OLD = {"custom", "tiny", "llama_7b", "gpt_neox_20b"}


def test_the_table_has_every_option() -> None:
    options = {path.stem for path in (root() / "conf" / "model").glob("*.yaml")} - OLD
    assert [f"`{option}`" for option in PUBLISHED] == [row[0] for row in ROWS]
    assert options == set(PUBLISHED)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_a_row_of_the_table_is_what_the_shape_of_the_model_gives(row: list[str]) -> None:
    option = row[0].strip("`")
    facts, millions, _ = PUBLISHED[option]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts))
    sizes = Sizes(model)
    assert round(sizes.parameters / 1e6) == millions == int(row[3])
    for words, printed in zip(COLUMNS, row[4:], strict=True):
        settings = composed_settings(f"model={option}", *words)
        needed = estimate(settings, sizes, Work(("sft", "reward", "ppo"), on_gpu=True))
        assert printed == f"{needed.peak / 2**30:.1f}"
    yaml = (root() / "conf" / "model" / f"{option}.yaml").read_text(encoding="utf-8")
    assert settings.model.name_or_path == row[1]
    assert row[2].partition(" ")[0] in yaml.partition("defaults")[0]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_a_command_of_the_page_would_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    option = words[0].partition("=")[2]
    name = composed_settings(words[0]).model.name_or_path
    assert name is not None
    publish_relative(option, name, tmp_path, tmp_path / "made")
    chats = [{"messages": [user(f"Which {i}?"), assistant(f"This {i}.")]} for i in range(400)]
    pairs = [{"prompt": f"Which {i}?", "chosen": "This.", "rejected": "None."} for i in range(800)]
    for file, rows in (("chats", chats), ("pairs", pairs)):
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = ["sft.warmup_steps=1", "reward.warmup_steps=1"]  # for so few rows
    assert run_in_process(*words, *few, "model.max_prompt_tokens=100") == 0
    shown = capsys.readouterr().out
    assert "done: false" in shown
    assert re.search(r"memory: about [\d.]+ GiB", shown)
