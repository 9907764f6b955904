"""File formats of data sets: all give the same rows, and a bad file is refused in one sentence."""

import gzip
import json
import random
from pathlib import Path

import datasets
import pytest
import zstandard

from rlhf.data.sources import Source
from rlhf.errors import DataError
from tests.helpers.question_rows import GOOD, json_line, numbered_rows, read_rows


def write_truncated_gzip(path: Path) -> None:
    whole = gzip.compress(
        b"".join(json_line({**row, "salt": random.Random(1).random()}) for row in numbered_rows(5000))
    )
    path.write_bytes(whole[: len(whole) // 2])


def write_truncated_zstd(path: Path) -> None:
    rows = b"".join(json_line({**row, "salt": random.Random(row["q"]).random()}) for row in numbered_rows(50_000))
    whole = zstandard.compress(rows)
    path.write_bytes(whole[: len(whole) // 2])


def write_corrupted_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"")[:10] + b"\xff" * 64)  # a valid header, then bytes that are no deflate stream


BAD_FILES = {
    "truncated gzip": ("x.jsonl.gz", write_truncated_gzip, r"x\.jsonl\.gz cannot be read beyond row [1-9][\d,]+: "),
    "corrupted gzip": ("x.jsonl.gz", write_corrupted_gzip, r"x\.jsonl\.gz cannot be read beyond row "),
    "truncated gzipped list": ("x.json.gz", write_truncated_gzip, r"x\.json\.gz cannot be read: Compressed file ended"),
    "no gzip": ("x.jsonl.gz", lambda p: p.write_bytes(json_line(GOOD)),
        r"cannot be read beyond row 0: Not a gzipped file"),
    "empty": ("x.jsonl", lambda p: p.touch(), r"x\.jsonl is empty\."),
    "empty gzip": ("x.jsonl.gz", lambda p: p.write_bytes(gzip.compress(b"")), r"x\.jsonl\.gz has no rows\."),
    "blank": ("x.jsonl", lambda p: p.write_bytes(b"\n\n"), r"x\.jsonl has no rows\."),
    "empty list": ("x.json", lambda p: p.write_bytes(b"[]"), r"x\.json has no rows\."),
    "directory": ("x.jsonl", lambda p: p.mkdir(), r"x\.jsonl is not a file; allowed: a file that ends in \.jsonl, "),
    "missing": ("x.jsonl", lambda p: None, r"x\.jsonl does not exist: name a file, or a Hub id"),
    "other suffix": ("x.xlsx", lambda p: p.write_bytes(b"PK"), r"x\.xlsx has an unknown suffix; allowed: \.jsonl, "),
    "truncated zstd": ("x.jsonl.zst", write_truncated_zstd, r"cannot be read beyond row [1-9][\d,]+: the file ends"),
    "no zstd": ("x.jsonl.zst", lambda p: p.write_bytes(json_line(GOOD)),
        r"x\.jsonl\.zst cannot be read beyond row 0: "),
    "truncated list as zstd": ("x.json.zst", write_truncated_zstd, r"x\.json\.zst cannot be read: the file ends"),
    "lines called json": ("x.json", lambda p: p.write_bytes(json_line(GOOD) * 2), r"x\.json is not valid JSON: Extra"),
    "no list": ("x.json", lambda p: p.write_bytes(json_line(GOOD)), r"x\.json does not contain a list of rows"),
    "list in Latin-1": ("x.json", lambda p: p.write_bytes('["é"]'.encode("latin-1")), r"not valid JSON: 'utf-8'"),
    "list in UTF-16": ("x.json", lambda p: p.write_bytes('["é"]'.encode("utf-16")), r"not valid JSON: 'utf-8'"),
    "lines in UTF-16": ("x.jsonl", lambda p: p.write_text(json.dumps(GOOD), "utf-16"), "x.jsonl can be used"),
    "list called jsonl": ("x.jsonl", lambda p: p.write_bytes(json_line([GOOD])),
        r"can be used \(1 × not a JSON object\)\."),
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
        read_rows(tmp_path, name)
    assert "\n" not in str(failure.value)


FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "csv", "tsv", "parquet"]


@pytest.mark.parametrize("write", [*FORMATS, "JSONL", "Jsonl.GZ", "JSON.ZST", "CSV", "TSV", "PARQUET"])
def test_every_format_gives_the_same_rows(tmp_path, write):
    path, good = tmp_path / f"rows.{write}", [*numbered_rows(2), {"q": "NA", "a": "Zoë, “None”"}]
    as_bytes = {"jsonl": b"\xef\xbb\xbf" + b"".join(map(json_line, good)), "json": json.dumps(good).encode()}
    form, _, packing = write.lower().partition(".")
    if form == "parquet":
        datasets.Dataset.from_list(good).to_parquet(path)
    elif form in ("csv", "tsv"):
        datasets.Dataset.from_list(good).to_csv(path, sep="," if form == "csv" else "\t")
    else:
        pack = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[packing]
        path.write_bytes(pack(as_bytes[form]))
    rows, report = read_rows(tmp_path, path.name)
    assert rows.to_list() == [{"prompt": row["q"], "response": row["a"]} for row in good]
    assert (report.read, report.skipped) == ({path.name: 3}, {})


def test_a_field_of_a_csv_is_text_and_a_row_of_another_length_a_bad_one(tmp_path):
    (tmp_path / "rows.csv").write_text("q,a\n1+1,2\n\n1+2,3,4\n1+3\n007,1.50\nNA,True\n")
    rows, report = read_rows(tmp_path, "rows.csv")
    assert list(zip(rows["prompt"], rows["response"], strict=True)) == [("1+1", "2"), ("007", "1.50"), ("NA", "True")]
    assert report.skipped == {
        ("rows.csv", "more fields than the header"): [2],
        ("rows.csv", "fewer fields than the header"): [3],
    }


def test_a_csv_may_be_gzipped(tmp_path):
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"q,a\nWho?,Me.\n"))
    assert read_rows(tmp_path, "rows.csv.gz")[0].to_list() == [{"prompt": "Who?", "response": "Me."}]


def test_zstd_may_come_in_several_frames_and_needs_its_package(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(json_line(row)) for row in numbered_rows(3)))
    assert len(read_rows(tmp_path, path.name)[0]) == 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"rows\.jsonl\.zst needs the package zstandard: pip install -e '\.\[zstd\]' in the checkout"
    ):
        Source.parse(path.name, tmp_path).check()
