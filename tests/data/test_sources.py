"""Data sources: what is checked before anything is read."""

from pathlib import Path

import pytest

from rlhf.data.sources import Source
from rlhf.errors import DataError


def test_check_finds_what_can_be_found_without_reading(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "empty.json").touch()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.json").write_text("[")
    for name in ("folder.json", "empty.json", "notes.txt", "missing.json", "missing", "./no/file"):
        with pytest.raises(DataError, match=Path(name).name):
            Source.parse(name, tmp_path).check()
    Source.parse("broken.json", tmp_path).check()  # is not read
    Source.parse("owner/name", tmp_path).check()  # is not looked up


MALFORMED = ["[6:", "[]", "[2]", "[-5:]", "[:-1]", "[3:3]", "[4:2]", "[:0]", "[:50%]", "[a:b]", "[1:2:3]", "[1:2]]"]


@pytest.mark.parametrize("window", MALFORMED)
def test_malformed_slice_is_refused(tmp_path, window):
    with pytest.raises(DataError, match="malformed slice: write"):
        Source.parse(f"rows.jsonl{window}", tmp_path)


@pytest.mark.parametrize("spec", [None, 7, "", {}, {"path": None}, ["rows.jsonl"]])
def test_malformed_sources_are_refused(tmp_path, spec):
    with pytest.raises(DataError, match="is not a data source"):
        Source.parse(spec, tmp_path)
