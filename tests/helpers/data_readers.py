"""Readers of a single data file, good rows for them, and files that they refuse or read in part."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import rlhf.sweep.resolvers  # noqa: F401
from rlhf.data.alpaca import Alpaca
from rlhf.data.imdb import Imdb
from rlhf.data.records import DataSource
from rlhf.data.stack_exchange import StackExchange
from rlhf.errors.explaining import explain

TEMPLATE = {"with_input": "Q: {instruction} ({input})\nA:", "without_input": "Q: {instruction}\nA:"}

GOOD = {"instruction": "Do", "output": "Done.", "output_1": "one", "output_2": "two", "preference": 1,
        "text": "A good film.", "label": 1}  # fmt: skip


def assert_one_sentence(error: BaseException, expected: str) -> None:
    """Assert that the command would print one line for this error, and that it matches the pattern `expected`."""
    said = explain(error)
    assert said is not None, f"a traceback would reach the user: {error!r}"
    assert "\n" not in said
    assert re.search(expected, said), said


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def alpaca(folder: Path, name: str, split: str = "sft") -> DataSource:
    return Alpaca(template=TEMPLATE, root=str(folder), **{split: name})


def preference(folder: Path, name: str) -> DataSource:
    return alpaca(folder, name, "preference")


def imdb(folder: Path, name: str) -> DataSource:
    return Imdb(reviews=name, shares={"sft": 1}, root=str(folder))


def dump(folder: Path, name: str) -> DataSource:
    return StackExchange(template=TEMPLATE, sources=name, shares={"prompts": 1}, root=str(folder))


def pairs(folder: Path, name: str) -> DataSource:
    return StackExchange(template=TEMPLATE, sources=name, shares={"preference": 1}, root=str(folder))


SPLIT = {alpaca: "sft", preference: "preference", imdb: "sft", dump: "prompts", pairs: "preference"}

PAIR = {"question": "Why?", "response_j": "So.", "response_k": "No."}

CHAT = [{"role": "user", "content": "Hi"}]

POST = b'<row Id="1" PostTypeId="1" Score="1" Body="Why?"/>'


def readable_id(value: object) -> str:
    """A test id for a table entry that is the same in every process."""
    return getattr(value, "__name__", str(value)[:40])


# reader, file name, content, and the error message or the numbers of rows kept and skipped
FILES: list[tuple[Callable, str, bytes, str | tuple[int, int]]] = [
    (alpaca, "x.jsonl", b"", "x.jsonl is empty"),
    (alpaca, "x.jsonl", b"\n \n", "x.jsonl has no rows"),
    (alpaca, "x.jsonl", b'{"instruction": "Do", "instruction": "Do not", "output": "x"}\n' + lines(GOOD), (1, 1)),
    (alpaca, "x.jsonl", b"\xef\xbb\xbf" + lines(GOOD), (1, 0)),
    (alpaca, "x.jsonl", lines(GOOD).decode().encode("utf-16"), "no row of x.jsonl can be used"),
    (alpaca, "x.jsonl", lines(GOOD) + b'{"instruction": "D\xe9j\xe0", "output": "x"}\n', (1, 1)),
    (alpaca, "x.jsonl", lines(GOOD).replace(b"\n", b"\r") * 2, "no row of x.jsonl can be used"),
    (alpaca, "x.jsonl", gzip.compress(lines(GOOD), mtime=0), "no row of x.jsonl can be used"),
    (alpaca, "x.jsonl", lines(GOOD) + b'{"instruction": "cut of', (1, 1)),
    (alpaca, "x.jsonl.gz", gzip.compress(lines(GOOD) * 999, mtime=0)[:-9], "x.jsonl.gz cannot be read beyond row"),
    (alpaca, "x.jsonl.gz", gzip.compress(lines(GOOD), mtime=0) + b"more", "x.jsonl.gz cannot be read beyond row 1"),
    (alpaca, "x.jsonl.gz", b"PK\x03\x04", "x.jsonl.gz cannot be read beyond row 0: Not a gzipped file"),
    (alpaca, "x.json", b"[", "x.json is not valid JSON"),
    (alpaca, "x.json", b'{"data": []}', "x.json does not contain a list of rows"),
    (alpaca, "x.json", b"[]", "x.json has no rows"),
    (alpaca, "x.json", b"[" * 99_999, "x.json is not valid JSON"),
    (alpaca, "x.json", b"[" + b"9" * 5_000 + b"]", "x.json is not valid JSON"),
    (alpaca, "x.json", b'[{"instruction": "a", "output": "b", "output": "c"}]', "1 × a key that occurs twice"),
    (alpaca, "x.csv", b"\n", "x.csv has no rows"),
    (alpaca, "x.csv", b"instruction,output\n", "x.csv has no rows"),
    (alpaca, "x.csv", b"instruction,output\nDo,x\nDo,x,y\nDo\nDo,y\n", (2, 2)),
    (alpaca, "x.csv", b"instruction,output\n1,2\na,\n", (1, 1)),
    (alpaca, "x.csv", b"instruction;output\nDo;x\n", "1 × no `instruction`"),
    (alpaca, "x.csv", b"instruction,instruction,output\na,b,c\n", "x.csv names a column twice"),
    (alpaca, "x.csv", b'instruction,output\na,"b\n', "x.csv cannot be read beyond row 0"),
    (alpaca, "x.csv", "instruction,output\né,x\n".encode("latin-1"), "x.csv cannot be read beyond row 0: 'utf-8'"),
    (alpaca, "x.csv", "instruction,output\na,x\n".encode("utf-16"), "x.csv cannot be read beyond row 0: 'utf-8'"),
    (alpaca, "x.parquet", b"PAR1 but no more", "x.parquet cannot be loaded"),
    (alpaca, "x.parquet", parquet(instruction=["a"] * 99, output=["b"] * 99)[:-9], "x.parquet cannot be loaded"),
    (alpaca, "x.parquet", parquet(instruction=[1], output=["b"]), "`instruction` is of type int, not text"),
    (alpaca, "x.parquet", parquet(instruction=["a", None], output=["b", "c"]), (1, 1)),
    (alpaca, "x.parquet", parquet(other=["a"]), "1 × no `instruction`"),
    (alpaca, "x.xlsx", b"PK\x03\x04", "x.xlsx has an unknown suffix"),
    (imdb, "x.csv", b"text,label\nA good film.,1.0\nA bad one.,0\n", (1, 1)),
    (dump, "x.xml", b"", "x.xml is empty"),
    (dump, "x.xml", b"<posts/>", r"no question can be used \(no rows\)"),
    (dump, "x.xml", b"<html><body>404</body></html>", r"no question can be used \(no rows\)"),
    (dump, "x.xml", b"<posts>" + POST, "x.xml is not valid XML beyond row 1"),
    (dump, "x.xml", b"\x00\xff", "x.xml is not valid XML beyond row 0"),
    (dump, "x.xml", b'<?xml version="1.0" encoding="nope"?><posts/>', "x.xml is not valid XML beyond row 0"),
    (dump, "x.xml", b'<?xml version="1.0" encoding="shift_jis"?><posts/>', "x.xml is not valid XML beyond row 0"),
    (dump, "x.xml", b'<!DOCTYPE p [<!ENTITY a SYSTEM "file:///etc/passwd">]><p>&a;</p>', "not valid XML .* entity"),
    (dump, "x.xml", b"<posts>" + POST + POST + b"</posts>", (1, 1)),
    (dump, "x.xml", b"<posts>" + POST + POST.replace(b'"1" Body', b'"9e9" Body') + b"</posts>", (1, 1)),
    (dump, "x.xml", b"<posts>" + POST + b'<row Id="2"/></posts>', (1, 1)),
    (dump, "x.xml.gz", b"<posts/>", "x.xml.gz cannot be read beyond row 0: Not a gzipped file"),
]


def usable_rows(source: DataSource, split: str) -> int:
    """Check and load a split; return its number of rows."""
    source.check()
    return len(source.load(split))
