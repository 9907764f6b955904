"""The names of runs' folders."""

import pytest

from rlhf.sweep.resolvers import folder_name

DIFFERENT = [
    ("data.template.without_input-Q: {instruction}?", "data.template.without_input-Q: {instruction}!"),
    ("data.sft-rows.jsonl[:500]", "data.sft-rows.jsonl[500:]"),
    ("model.name_or_path-/m/llama/chat", "model.name_or_path-/m/llama-chat"),
    ("evaluation.factscore.prompt-Who is {entity}?", "evaluation.factscore.prompt-Who is {entity}."),
    ("scorer.words-.", "scorer.words-"),
    ("x-" + "ß" * 200, "x-" + "ß" * 201),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_overrides_have_different_folders(one: str, other: str) -> None:
    assert folder_name(one) != folder_name(other)
    for name in (folder_name(one), folder_name(other)):
        assert len(name.encode()) <= 255
        assert "/" not in name
