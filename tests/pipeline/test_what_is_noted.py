"""What a run notes when it begins: the content of the files that it reads."""

from pathlib import Path

from rlhf.pipeline import identity


def test_the_content_of_named_files_is_noted(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for path in (one, two):
        path.write_text("{}\n")
    config = {"data": {"sft": {"path": str(one)}, "rows": 3, "more": [str(two), "word"]}, "judge": {"model": "word"}}
    before = identity.contents(config)
    assert before.keys() == {"data.sft.path", "data.more"}
    one.write_text('{"a": 1}\n')
    after = identity.contents(config)
    assert before["data.sft.path"] != after["data.sft.path"]
    assert before["data.more"] == after["data.more"]


def test_files_below_a_root_are_noted_by_the_keys_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a\n")
    found = identity.contents({"data": {"root": str(tmp_path), "splits": {"sft": "rows.csv[:10]"}}})
    assert found.keys() == {"data.splits.sft"}
    assert str(found["data.splits.sft"]).endswith(".csv[:10]")
