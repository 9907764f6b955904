"""docs/advantages.md: its commands are checked and run, and its table says what the options set."""

import re
from pathlib import Path

import pytest

from rlhf import root
from rlhf.files import SUMMARY
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.composed_config import compose_and_check, composed_settings

PAGE = (root() / "docs" / "advantages.md").read_text(encoding="utf-8")
COMMANDS = [line.split()[1:] for text in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
            for line in text.splitlines()]  # fmt: skip
# option, the k in its row, the keys in its last column
OPTIONS = re.findall(r"^\| `(\w+)` \|[^|\n]*\|[^|\n]*\| (\d+) \|(.*)\|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_is_allowed(words: list[str]) -> None:
    compose_and_check(*words)


@pytest.mark.long
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_trains(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_in_process(*words, *TINY, "ppo.rollout_batch_size=16", "ppo.minibatch_size=8", "name=page") == 0
    (summary,) = Path("outputs/page").glob(f"*/{SUMMARY}")
    lines = [line for line in read_metrics(summary.parent) if "ppo/reward" in line]
    assert len(lines) == 3
    assert not any("ppo/value_loss" in line for line in lines)


def test_the_table_has_every_option_and_what_it_sets() -> None:
    assert {name for name, *_ in OPTIONS} == {path.stem for path in (root() / "conf" / "advantages").glob("*.yaml")}
    for name, samples, besides in OPTIONS:
        settings = composed_settings(f"advantages={name}")
        assert settings.advantages.name == name
        assert settings.generation.samples_per_prompt == int(samples)
        assert settings.ppo.value_model == ("adapter" if name == "gae" else "none")
        said = dict(re.findall(r"`ppo\.(\w+)=(\w+)`", besides))
        assert settings.ppo.loss_aggregation == said.get("loss_aggregation", "token_mean")
        assert str(settings.ppo.whiten_advantages).lower() == said.get("whiten_advantages", str(name == "gae").lower())
        assert settings.ppo.whiten_rewards == (name == "gae")
