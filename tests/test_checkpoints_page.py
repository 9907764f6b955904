"""docs/checkpoints.md: its commands are checked with stand-ins for the models of the Hub, in its local cache."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf import root
from tests.helpers.released_models import on_the_hub, released, weight_difference

pytestmark = pytest.mark.slow
PAGE = (root() / "docs" / "checkpoints.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"\s+#.*", "", line).split()[1:]
    for text in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    for line in text.splitlines()
    if line.startswith("rlhf ")
    and "smollm2_ultrafeedback" not in line  # run as a whole in tests/finished/test_chain.py
]
# LLaMA-7B and Alpaca's data are larger than a test
INSTEAD = {"recipe=paper": "model.max_prompt_tokens=64", "data=alpaca_farm": "data=farm",
           "model=llama_7b": "model=custom model.name_or_path=huggyllama/llama-7b"}  # fmt: skip
SMALL_DATA = ["data.demonstrations=200", "data.comparisons=120", "data.people=12", "data.eval_prompts=8",
              "sft.warmup_steps=1", "reward.warmup_steps=1"]  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of the Hub's cache with all models of the page."""
    folder = tmp_path_factory.mktemp("hub")
    made = released(folder / "made")
    differences = weight_difference(made, folder / "differences", AutoTokenizer.from_pretrained(made.sft))
    for name, place in {
        "me/sft": made.sft, "me/adapter": made.adapter, "me/reward": made.reward,
        "tatsu-lab/alpaca-farm-sft10k-wdiff": differences.sft,
        "tatsu-lab/alpaca-farm-reward-model-human-wdiff": differences.reward, "huggyllama/llama-7b": differences.base,
    }.items():  # fmt: skip
        on_the_hub(place, name, folder / "home" / "hub")
    return folder / "home"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_would_run(
    words: list[str], hub: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub / "hub"))
    words = [part for word in words for part in INSTEAD.get(word, word).split()]
    code, said, error = command(*words, *SMALL_DATA, "dry_run=true")
    assert code == 0, error
    for word in words:
        key, _, name = word.partition("=")
        if key in ("sft.from", "reward.from"):
            assert f"{key.partition('.')[0]}: taken from {name} at 0123456789ab" in said.replace("\n      ", " ")
