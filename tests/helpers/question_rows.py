"""Rows with a question and an answer, and a reader that makes records of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.data.fields import text_field
from rlhf.data.reading import read_records
from rlhf.data.records import Demonstration
from rlhf.data.sources import Source

GOOD = {"q": "Who?", "a": "Me."}


def to_record(row: Mapping[str, Any]) -> Demonstration:
    return Demonstration(text_field(row, "q"), text_field(row, "a"))


def read_rows(root: Path, *specs: Any, **options: Any):
    return read_records(tuple(Source.parse(spec, root) for spec in specs), to_record, "sft", **options)


def json_line(row: object) -> bytes:
    return json.dumps(row).encode() + b"\n"


def numbered_rows(count: int) -> list[dict[str, str]]:
    return [{"q": f"question {number}", "a": f"answer {number}"} for number in range(1, count + 1)]
