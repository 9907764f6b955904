"""The reward model's accuracy by kind of comparison, as a run records it."""

from collections import Counter
from pathlib import Path

import pytest

from rlhf.data.farm import Farm
from rlhf.tracking.summary import read_summary
from tests.helpers.command_line import TINY, run_in_process

PAIRS = 80


@pytest.mark.slow
def test_equal_comparisons_keep_the_kinds_that_they_were_made_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts cut after four tokens are often equal, however they were made; the row does not tell its kind."""
    farm = Farm(people=2, held_out_comparisons=PAIRS, max_response_tokens=4)
    rows, kinds = farm.load("preference_validation").to_list(), farm.kinds()
    found: dict[str, set[str]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        found.setdefault(repr(row), set()).add(kind)
    assert any(len(kinds) > 1 for kinds in found.values())

    monkeypatch.chdir(tmp_path)
    size = [f"data.held_out_comparisons={PAIRS}", f"reward.validation_size={PAIRS}", "data.people=2"]
    assert run_in_process(*TINY, *size, "data.max_response_tokens=4", "stage=reward") == 0
    (folder,) = (path.parent for path in Path("outputs/cache").glob("reward-*/summary.json"))
    by_kind = (read_summary(folder) or {})["by_kind"]
    assert {kind: line["pairs"] for kind, line in by_kind.items()} == Counter(kinds)
