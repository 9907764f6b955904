"""Rows into records: every row read is kept or reported, whatever is wrong with it or with its file."""

import gzip
import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.fields import MAX_TEXT, text_field
from rlhf.data.reading import read_records
from rlhf.data.records import Demonstration
from rlhf.data.row_files import MAX_LINE
from rlhf.data.sources import Source
from rlhf.errors import DataError

GOOD = {"q": "Who?", "a": "Me."}


def to_record(row: Mapping[str, Any]) -> Demonstration:
    return Demonstration(text_field(row, "q"), text_field(row, "a"))


def read(root: Path, *specs: Any, **options: Any):
    return read_records(tuple(Source.parse(spec, root) for spec in specs), to_record, "sft", **options)


def line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def numbered(count: int) -> list[dict[str, str]]:
    return [{"q": f"question {number}", "a": f"answer {number}"} for number in range(1, count + 1)]


BAD_LINES = {
    "malformed": (b'{"q": "Who?", "a"\n', "malformed JSON"),
    "duplicate key": (b'{"q": "Who?", "a": "Me.", "a": "You."}\n', "a key that occurs twice"),
    "nested too deeply": (b"[" * 100_000 + b"\n", "malformed JSON"),
    "endless number": (b"1" * 10_000 + b"\n", "malformed JSON"),
    "wrong encoding": ('{"q": "Qui?", "a": "Déjà"}\n'.encode("latin-1"), "not UTF-8"),
    "not an object": (line(["Who?", "Me."]), "not a JSON object"),
    "null row": (line(None), "not a JSON object"),
    "missing": (line({"q": "Who?"}), "no `a`"),
    "null": (line({**GOOD, "a": None}), "no `a`"),
    "empty": (line({**GOOD, "a": ""}), "empty `a`"),
    "blank": (line({**GOOD, "a": " \n\t"}), "empty `a`"),
    "chat list": (line({**GOOD, "a": [{"role": "user", "content": "Hi"}]}), "`a` is of type list, not text"),
    "number": (line({**GOOD, "q": 7}), "`q` is of type int, not text"),
    "lone surrogate": (b'{"q": "Who?", "a": "\\ud83d"}\n', "`a` contains half a character (a lone surrogate)"),
    "gigantic text": (line({**GOOD, "a": "x" * (MAX_TEXT + 1)}), "`a` is longer than 1,000,000 characters"),
    "gigantic line": (line({**GOOD, "more": "x" * 2 * MAX_LINE}), "longer than 16,000,000 bytes"),
    "duplicate": (line({"q": " question 1", "a": "answer 1\n"}), "duplicate of an earlier row"),
}


@pytest.mark.parametrize(("bad", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_is_skipped_counted_and_located(tmp_path, caplog, bad, reason):
    first, second, third = (line(row) for row in numbered(3))
    (tmp_path / "rows.jsonl").write_bytes(first + second + b"\n" + bad + third)  # a blank line is no row
    with caplog.at_level(logging.WARNING):
        rows, report = read(tmp_path, "rows.jsonl")
    assert rows.to_list() == [{"prompt": f"question {number}", "response": f"answer {number}"} for number in (1, 2, 3)]
    assert report.read == {"rows.jsonl": 4}
    assert report.skipped == {("rows.jsonl", reason): [4]}
    assert report.counts == {reason: 1}
    assert caplog.messages == [f"sft: rows.jsonl: 1 of 4 rows skipped: {reason} (row 4)"]
    with pytest.raises(DataError, match=r"^sft: rows.jsonl, row 4: .*on_bad_row") as failure:
        read(tmp_path, "rows.jsonl", on_bad_row="fail")
    assert reason in str(failure.value)


def write_truncated_gzip(path: Path) -> None:
    whole = gzip.compress(b"".join(line({**row, "salt": random.Random(1).random()}) for row in numbered(5000)))
    path.write_bytes(whole[: len(whole) // 2])


def write_truncated_zstd(path: Path) -> None:
    rows = b"".join(line({**row, "salt": random.Random(row["q"]).random()}) for row in numbered(50_000))
    whole = zstandard.compress(rows)
    path.write_bytes(whole[: len(whole) // 2])


def write_corrupted_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"")[:10] + b"\xff" * 64)  # a good header, then no deflate stream


BAD_FILES = {
    "truncated gzip": ("x.jsonl.gz", write_truncated_gzip, r"x\.jsonl\.gz cannot be read beyond row [1-9][\d,]+: "),
    "corrupted gzip": ("x.jsonl.gz", write_corrupted_gzip, r"x\.jsonl\.gz cannot be read beyond row "),
    "truncated gzipped list": ("x.json.gz", write_truncated_gzip, r"x\.json\.gz cannot be read: Compressed file ended"),
    "no gzip": ("x.jsonl.gz", lambda p: p.write_bytes(line(GOOD)), r"cannot be read beyond row 0: Not a gzipped file"),
    "empty": ("x.jsonl", lambda p: p.touch(), r"x\.jsonl is empty\."),
    "empty gzip": ("x.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b"")), r"x\.jsonl\.gz has no rows\."),
    "blank": ("x.jsonl", lambda p: p.write_bytes(b"\n\n"), r"x\.jsonl has no rows\."),
    "empty list": ("x.json", lambda p: p.write_bytes(b"[]"), r"x\.json has no rows\."),
    "directory": ("x.jsonl", lambda p: p.mkdir(), r"x\.jsonl is not a file; allowed: a file that ends in \.jsonl, "),
    "missing": ("x.jsonl", lambda p: None, r"x\.jsonl does not exist: name a file, or a Hub id"),
    "other suffix": ("x.xlsx", lambda p: p.write_bytes(b"PK"), r"x\.xlsx has an unknown suffix; allowed: \.jsonl, "),
    "truncated zstd": ("x.jsonl.zst", write_truncated_zstd, r"cannot be read beyond row [1-9][\d,]+: the file ends"),
    "no zstd": ("x.jsonl.zst", lambda p: p.write_bytes(line(GOOD)), r"x\.jsonl\.zst cannot be read beyond row 0: "),
    "truncated list as zstd": ("x.json.zst", write_truncated_zstd, r"x\.json\.zst cannot be read: the file ends"),
    "lines called json": ("x.json", lambda p: p.write_bytes(line(GOOD) * 2), r"x\.json is not valid JSON: Extra"),
    "no list": ("x.json", lambda p: p.write_bytes(line(GOOD)), r"x\.json does not contain a list of rows"),
    "list in Latin-1": ("x.json", lambda p: p.write_bytes('["é"]'.encode("latin-1")), r"not valid JSON: 'utf-8'"),
    "list in UTF-16": ("x.json", lambda p: p.write_bytes('["é"]'.encode("utf-16")), r"not valid JSON: 'utf-8'"),
    "lines in UTF-16": ("x.jsonl", lambda p: p.write_text(json.dumps(GOOD), "utf-16"), "x.jsonl can be used"),
    "list called jsonl": ("x.jsonl", lambda p: p.write_bytes(line([GOOD])), r"can be used \(1 × not a JSON object\)\."),
    "broken parquet": ("x.parquet", lambda p: p.write_bytes(b"PAR1"), r"x\.parquet cannot be loaded \(\w+: "),
    "unclosed quote": ("x.csv", lambda p: p.write_text('q,a\n1,2\n3,"4\n5,6'), r"x\.csv cannot be read beyond row 1: "),
    "CSV in Latin-1": ("x.csv", lambda p: p.write_bytes(b"q,a\n\xe9,2"), r"x\.csv cannot be read beyond row 0: "),
    "two columns of a name": ("x.csv", lambda p: p.write_text("q,a,a\n1,2,3\n"), r"x\.csv names a column twice"),
    "no header": ("x.csv", lambda p: p.write_text("\n"), r"x\.csv has no rows\."),
    "header alone": ("x.csv", lambda p: p.write_text("q,a\n"), r"x\.csv has no rows\."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write", "sentence"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_fatal_in_one_sentence(tmp_path, name, write, sentence):
    write(tmp_path / name)
    with pytest.raises(DataError, match=sentence) as failure:
        read(tmp_path, name)
    assert "\n" not in str(failure.value)


FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "csv", "tsv", "parquet"]


@pytest.mark.parametrize("write", [*FORMATS, "JSONL", "Jsonl.GZ", "JSON.ZST", "CSV", "TSV", "PARQUET"])
def test_every_format_gives_the_same_rows(tmp_path, write):
    path, good = tmp_path / f"rows.{write}", [*numbered(2), {"q": "NA", "a": "Zoë, “None”"}]
    as_bytes = {"jsonl": b"\xef\xbb\xbf" + b"".join(map(line, good)), "json": json.dumps(good).encode()}
    form, _, packing = write.lower().partition(".")
    if form == "parquet":
        datasets.Dataset.from_list(good).to_parquet(path)
    elif form in ("csv", "tsv"):
        datasets.Dataset.from_list(good).to_csv(path, sep="," if form == "csv" else "\t")
    else:
        pack = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[packing]
        path.write_bytes(pack(as_bytes[form]))
    rows, report = read(tmp_path, path.name)
    assert rows.to_list() == [{"prompt": row["q"], "response": row["a"]} for row in good]
    assert (report.read, report.skipped) == ({path.name: 3}, {})


def test_a_field_of_a_csv_is_text_and_a_row_of_another_length_a_bad_one(tmp_path):
    (tmp_path / "rows.csv").write_text("q,a\n1+1,2\n\n1+2,3,4\n1+3\n007,1.50\nNA,True\n")
    rows, report = read(tmp_path, "rows.csv")
    assert list(zip(rows["prompt"], rows["response"], strict=True)) == [("1+1", "2"), ("007", "1.50"), ("NA", "True")]
    assert report.skipped == {
        ("rows.csv", "more fields than the header"): [2],
        ("rows.csv", "fewer fields than the header"): [3],
    }


def test_a_csv_may_be_gzipped(tmp_path):
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"q,a\nWho?,Me.\n"))
    assert read(tmp_path, "rows.csv.gz")[0].to_list() == [{"prompt": "Who?", "response": "Me."}]


def test_zstd_may_come_in_several_frames_and_needs_its_package(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(line(row)) for row in numbered(3)))
    assert len(read(tmp_path, path.name)[0]) == 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst needs the package zstandard: pip install 'rlhf\[zstd\]'"):
        Source.parse(path.name, tmp_path).check()


DAMAGE = {
    "truncated": ("*.arrow", lambda content: content[: len(content) // 2]),
    "overwritten": ("*.arrow", lambda content: b"\7" * len(content)),
    "emptied": ("*.arrow", lambda content: b""),
    "not JSON": ("dataset_info.json", lambda content: b"{"),
    "no object": ("dataset_info.json", lambda content: b"17"),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_cache_is_told_in_a_sentence_that_names_it(tmp_path, datasets_cache, name, damage):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(line, numbered(9))) + b'17\n{"a": 1}\n')
    kept = read(tmp_path, "rows.jsonl")[0].to_list()
    damaged = next(datasets_cache.rglob(name))
    damaged.write_bytes(damage(damaged.read_bytes()))
    with pytest.raises(
        DataError, match=r"^sft: the rows cannot be read from the cache of `datasets` \(\w+: "
    ) as failure:
        read(tmp_path, "rows.jsonl")
    assert f"delete {datasets_cache}/generator, " in str(failure.value)
    assert "\n" not in str(failure.value)
    shutil.rmtree(datasets_cache / "generator")
    assert read(tmp_path, "rows.jsonl")[0].to_list() == kept


def test_hub_id_and_mapping_go_to_load_dataset(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)  # `load_dataset` takes a folder of this name for the Hub's
    for split, count in (("train", 4), ("test", 2)):
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_bytes(b"".join(map(line, numbered(count))))
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    for spec, kept in (("owner/name", 4), ("owner/name:test", 2), ("owner/name:default:train[1:]", 3),
                       ({"path": "owner/name", "split": "test"}, 2)):  # fmt: skip
        assert len(read(elsewhere, spec)[0]) == kept
    for spec in ("owner/name:nosuch", "owner/name:nosuch:train", {"path": "owner/name", "nosuch": 1}):
        with pytest.raises(DataError, match=r"^owner/name.* cannot be loaded \("):
            read(elsewhere, spec)


WINDOWS = {"[:2]": [1, 2], "[2:]": [3, 4, 5], "[1:3]": [2, 3], "[3:9]": [4, 5], "[:]": [1, 2, 3, 4, 5]}


@pytest.mark.parametrize(("window", "numbers"), WINDOWS.items())
def test_slice_takes_these_rows(tmp_path, window, numbers):
    (tmp_path / "rows.jsonl").write_bytes(b"".join(map(line, numbered(5))))
    rows, report = read(tmp_path, f"rows.jsonl{window}")
    assert rows["response"] == [f"answer {number}" for number in numbers]
    assert report.read == {f"rows.jsonl{window}": len(numbers)}


def test_slice_behind_the_end_is_fatal(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(line(GOOD))
    with pytest.raises(DataError, match=r"rows\.jsonl has no rows in that slice\."):
        read(tmp_path, "rows.jsonl[1:]")


def test_report_is_the_same_from_the_cache(tmp_path, datasets_cache, caplog):
    (tmp_path / "rows.jsonl").write_bytes(line(GOOD) + b"{\n" + line({**GOOD, "a": ""}))
    first = read(tmp_path, "rows.jsonl")
    cached = {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")}
    messages = list(caplog.messages)
    caplog.clear()
    second = read(tmp_path, "rows.jsonl")
    assert len(messages) == 2
    assert caplog.messages == messages
    assert second[1] == first[1]
    assert second[0].to_list() == first[0].to_list()
    assert second[0]._fingerprint == first[0]._fingerprint
    assert cached == {
        path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")
    }  # nothing was made anew


def test_changed_file_is_read_again_even_if_size_and_time_are_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(GOOD))
    before, stat = read(tmp_path, path.name)[0], path.stat()
    path.write_bytes(line({**GOOD, "a": "You"}))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = read(tmp_path, path.name)[0]
    assert (before["response"], after["response"]) == (["Me."], ["You"])


def test_duplicates_are_kept_on_request_and_found_across_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(line(GOOD))
    assert len(read(tmp_path, "a.jsonl", "b.jsonl", deduplicate=False)[0]) == 2
    rows, report = read(tmp_path, "a.jsonl", "b.jsonl")
    assert (len(rows), report.read) == (1, {"a.jsonl": 1, "b.jsonl": 1})
    assert report.skipped == {("b.jsonl", "duplicate of an earlier row"): [1]}


def test_long_lists_of_rows_are_abridged(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(line(GOOD) + b"{\n" * 1200)
    report = read(tmp_path, "rows.jsonl")[1]
    assert report.lines() == ["rows.jsonl: 1,200 of 1,201 rows skipped: malformed JSON (rows 2, 3, 4, …)"]


any_value = st.none() | st.integers() | st.sampled_from(["", " ", "x", "y", "\ud800"]) | st.just([])
any_line = st.one_of(
    st.dictionaries(st.sampled_from("qab"), any_value).map(line),
    st.binary(max_size=6).map(lambda some: some.replace(b"\n", b"") + b"\n"),
)


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(any_line, max_size=12))
def test_rows_read_are_rows_kept_and_rows_skipped(lines):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_bytes(line(GOOD) + b"".join(lines))
        rows, report = read(Path(folder), "rows.jsonl", deduplicate=False)
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
