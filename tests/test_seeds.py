"""docs/seeds.md: every command composes, and is accepted by the checks that need no file of the user's."""

import re
import shlex

import pytest

from rlhf import root
from rlhf.finished.compare.configuration import compose, split_words
from rlhf.pipeline.config import settings_of, target_class
from tests.helpers.composed_config import composed

PAGE = (root() / "docs" / "seeds.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
CLAIMS = [row for row in ROWS if row[0] != "claim"]
COMMANDS = [command for command in re.findall(r"`(rlhf(?: [^`]*)?)`", PAGE) if "dry_run=true` behind" not in command]


def overrides(command: str) -> list[str]:
    """The overrides of a command; of several values of a sweep the first."""
    words = [word for word in shlex.split(command)[1:] if word != "-m"]
    sweep = " -m " in f"{command} "
    return [word.partition(",")[0] if sweep and "{" not in word and "[" not in word else word for word in words]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    config = composed(*overrides(command))
    settings_of(config)
    for key in ("scorer", "judge", "preferences", "data", "kl", "trainer"):
        assert callable(target_class(config[key], key))


@pytest.mark.parametrize("command", re.findall(r"`(rlhf-compare [^`]*)`", PAGE))
def test_every_comparison_composes(command: str) -> None:
    players, overrides = split_words(shlex.split(command)[1:])
    assert players == ["RUN", "RUN"]
    assert callable(target_class(compose(overrides, None).judge, "judge"))


def test_every_claim_has_a_command_or_a_reason() -> None:
    assert len(CLAIMS) > 50
    for claim, command, here in CLAIMS:
        assert re.match(r"(yes|in part|not here)", here), claim
        assert command.startswith("`rlhf") or here.startswith("not here"), claim


def test_a_command_that_does_not_compose_is_found() -> None:
    with pytest.raises(Exception, match="nope"):
        composed(*overrides("rlhf -m recipe=nope,paper"))
