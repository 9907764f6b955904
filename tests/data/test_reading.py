"""Reading rows into records: every row is kept or reported, whatever is wrong with it or with its file."""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.fields import MAX_TEXT, text_field
from rlhf.data.row_files import MAX_LINE
from rlhf.errors import DataError
from tests.helpers.question_rows import GOOD, json_line, numbered_rows, read_rows

BAD_LINES = {
    "malformed": (b'{"q": "Who?", "a"\n', "malformed JSON"),
    "duplicate key": (b'{"q": "Who?", "a": "Me.", "a": "You."}\n', "a key that occurs twice"),
    "nested too deeply": (b"[" * 100_000 + b"\n", "malformed JSON"),
    "endless number": (b"1" * 10_000 + b"\n", "malformed JSON"),
    "wrong encoding": ('{"q": "Qui?", "a": "Déjà"}\n'.encode("latin-1"), "not UTF-8"),
    "not an object": (json_line(["Who?", "Me."]), "not a JSON object"),
    "null row": (json_line(None), "not a JSON object"),
    "missing": (json_line({"q": "Who?"}), "no `a`"),
    "null": (json_line({**GOOD, "a": None}), "no `a`"),
    "empty": (json_line({**GOOD, "a": ""}), "empty `a`"),
    "blank": (json_line({**GOOD, "a": " \n\t"}), "empty `a`"),
    "chat list": (json_line({**GOOD, "a": [{"role": "user", "content": "Hi"}]}), "`a` is of type list, not text"),
    "number": (json_line({**GOOD, "q": 7}), "`q` is of type int, not text"),
    "lone surrogate": (b'{"q": "Who?", "a": "\\ud83d"}\n', "`a` contains half a character (a lone surrogate)"),
    "gigantic text": (json_line({**GOOD, "a": "x" * (MAX_TEXT + 1)}), "`a` is longer than 1,000,000 characters"),
    "gigantic line": (json_line({**GOOD, "more": "x" * 2 * MAX_LINE}), "longer than 16,000,000 bytes"),
    "duplicate": (json_line({"q": " question 1", "a": "answer 1\n"}), "duplicate of an earlier row"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_is_skipped_counted_and_located(tmp_path, caplog, bad, reason):
    first, second, third = (json_line(row) for row in numbered_rows(3))
    (tmp_path / "rows.jsonl").write_bytes(first + second + b"\n" + bad + third)  # a blank line does not count as a row
    with caplog.at_level(logging.WARNING):
        rows, report = read_rows(tmp_path, "rows.jsonl")
    assert rows.to_list() == [{"prompt": f"question {number}", "response": f"answer {number}"} for number in (1, 2, 3)]
    assert report.read == {"rows.jsonl": 4}
    assert report.skipped == {("rows.jsonl", reason): [4]}
    assert report.counts == {reason: 1}
    assert caplog.messages == [f"sft: rows.jsonl: 1 of 4 rows skipped: {reason} (row 4)"]
    with pytest.raises(DataError, match=r"^sft: rows.jsonl, row 4: .*on_bad_row") as failure:
        read_rows(tmp_path, "rows.jsonl", on_bad_row="fail")
    assert reason in str(failure.value)


DAMAGE = {
    "truncated": ("*.arrow", lambda content: content[: len(content) // 2]),
    "overwritten": ("*.arrow", lambda content: b"\7" * len(content)),
    "emptied": ("*.arrow", lambda content: b""),
    "not JSON": ("dataset_info.json", lambda content: b"{"),
    "no object": ("dataset_info.json", lambda content: b"17"),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_cache_is_told_in_a_sentence_that_names_it(tmp_path, datasets_cache, name, damage):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(json_line, numbered_rows(9))) + b'17\n{"a": 1}\n')
    kept = read_rows(tmp_path, "rows.jsonl")[0].to_list()
    damaged = next(datasets_cache.rglob(name))
    damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(
        DataError, match=r"^sft: the rows cannot be read from the cache of `datasets` \(\w+: "
    ) as failure:
        read_rows(tmp_path, "rows.jsonl")
    assert f"delete {datasets_cache}/generator, " in str(failure.value)
    assert "\n" not in str(failure.value)
    shutil.rmtree(datasets_cache / "generator")
    assert read_rows(tmp_path, "rows.jsonl")[0].to_list() == kept


def test_hub_id_and_mapping_go_to_load_dataset(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)  # `load_dataset` prefers a folder of this name to the Hub
    for split, count in (("train", 4), ("test", 2)):
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_bytes(b"".join(map(json_line, numbered_rows(count))))
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    for spec, kept in (("owner/name", 4), ("owner/name:test", 2), ("owner/name:default:train[1:]", 3),
                       ({"path": "owner/name", "split": "test"}, 2)):  # fmt: skip
        assert len(read_rows(elsewhere, spec)[0]) == kept
    for spec in ("owner/name:nosuch", "owner/name:nosuch:train", {"path": "owner/name", "nosuch": 1}):
        with pytest.raises(DataError, match=r"^owner/name.* cannot be loaded \("):
            read_rows(elsewhere, spec)


WINDOWS = {"[:2]": [1, 2], "[2:]": [3, 4, 5], "[1:3]": [2, 3], "[3:9]": [4, 5], "[:]": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize(("window", "numbers"), WINDOWS.items())
def test_slice_takes_these_rows(tmp_path, window, numbers):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(json_line, numbered_rows(5))))
    rows, report = read_rows(tmp_path, f"rows.jsonl{window}")
    assert rows["response"] == [f"answer {number}" for number in numbers]
    assert report.read == {f"rows.jsonl{window}": len(numbers)}


def test_slice_behind_the_end_is_fatal(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json_line(GOOD))
    with pytest.raises(DataError, match=r"rows\.jsonl has no rows in that slice\."):
        read_rows(tmp_path, "rows.jsonl[1:]")


def test_report_is_the_same_from_the_cache(tmp_path, datasets_cache, caplog, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(json_line(GOOD) + b"{\n" + json_line({**GOOD, "a": ""}))
    first = read_rows(tmp_path, "rows.jsonl")
    cached = {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")}
    messages = list(caplog.messages)
    caplog.clear()
    monkeypatch.setattr("rlhf.data.reading._said", set())  # as in another process
    second = read_rows(tmp_path, "rows.jsonl")
    assert len(messages) == 2
    assert caplog.messages == messages
    assert second[1] == first[1]
    assert second[0].to_list() == first[0].to_list()
    assert second[0]._fingerprint == first[0]._fingerprint
    assert cached == {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")}  # nothing was rebuilt


def test_changed_file_is_read_again_even_if_size_and_time_are_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_line(GOOD))
    before, stat = read_rows(tmp_path, path.name)[0], path.stat()
    path.write_bytes(json_line({**GOOD, "a": "You"}))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = read_rows(tmp_path, path.name)[0]
    assert (before["response"], after["response"]) == (["Me."], ["You"])


def test_duplicates_are_kept_on_request_and_found_across_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(json_line(GOOD))
    assert len(read_rows(tmp_path, "a.jsonl", "b.jsonl", deduplicate=False)[0]) == 2
    rows, report = read_rows(tmp_path, "a.jsonl", "b.jsonl")
    assert (len(rows), report.read) == (1, {"a.jsonl": 1, "b.jsonl": 1})
    assert report.skipped == {("b.jsonl", "duplicate of an earlier row"): [1]}


def test_long_lists_of_rows_are_abridged(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json_line(GOOD) + b"{\n" * 1200)
    report = read_rows(tmp_path, "rows.jsonl")[1]
    assert report.lines() == ["rows.jsonl: 1,200 of 1,201 rows skipped: malformed JSON (rows 2, 3, 4, …)"]


any_value = st.none() | st.integers() | st.sampled_from(["", " ", "x", "y", "\ud800"]) | st.just([])
any_line = st.one_of(
    st.dictionaries(st.sampled_from("qab"), any_value).map(json_line),
    st.binary(max_size=6).map(lambda some: some.replace(b"\n", b"") + b"\n"),
)


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(any_line, max_size=12))
def test_rows_read_are_rows_kept_and_rows_skipped(lines):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_bytes(json_line(GOOD) + b"".join(lines))
        rows, report = read_rows(Path(folder), "rows.jsonl", deduplicate=False)
    good = [number for number, some in enumerate(lines, start=2) if is_good(some)]
    skipped = sorted(number for numbers in report.skipped.values() for number in numbers)
    blank = [number for number, some in enumerate(lines, start=2) if not some.strip()]
    assert len(rows) == 1 + len(good)
    assert sorted([*good, *skipped, *blank]) == list(range(2, len(lines) + 2))
    assert report.read == {"rows.jsonl": 1 + len(lines) - len(blank)}


def is_good(some: bytes) -> bool:
    try:
        row = json.loads(some.decode())
    except ValueError:
        return False
    return isinstance(row, dict) and all(row.get(name) in ("x", "y") for name in "qa")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (" Yes. ", "Yes."),
        ("\u00a0Yes.\u00a0\n", "Yes."),
        (" Yes\nand no", "Yes\nand no"),
        ("    def f():\n        return 1\n", "def f():\n    return 1"),
        ("\n \n\tif a:\n\t\tb\n", "if a:\n\tb"),
        ("        return x\n    }\n", "    return x\n}"),
        ("  a\n\n  b  ", "a\n\nb"),
        ("  a\n\tb", "  a\n\tb"),
        ("1. one\n   two", "1. one\n   two"),
    ],
)
def test_an_indentation_is_taken_from_all_lines_or_from_none(given: str, expected: str) -> None:
    assert text_field({"a": given}, "a") == expected
