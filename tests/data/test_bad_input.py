"""Bad data files: each is refused in one sentence, or its bad rows are skipped and counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DataError
from tests.helpers.data_readers import (
    CHAT,
    FILES,
    GOOD,
    PAIR,
    SPLIT,
    alpaca,
    assert_one_sentence,
    dump,
    imdb,
    lines,
    pairs,
    preference,
    readable_id,
    usable_rows,
)

# reader, a bad row that follows a good one, and the reason for which it is skipped
ROWS: list[tuple[Callable, Any, str]] = [
    (alpaca, "text", "not a JSON object"),
    (alpaca, 7, "not a JSON object"),
    (alpaca, None, "not a JSON object"),
    (alpaca, [GOOD], "not a JSON object"),
    (alpaca, {}, "no `instruction`"),
    (alpaca, {"Instruction": "Do", "output": "x"}, "no `instruction`"),
    (alpaca, {"instruction": "Do"}, "no `output`"),
    (alpaca, {"instruction": "", "output": "x"}, "empty `instruction`"),
    (alpaca, {"instruction": "Do", "output": " \n\u00a0"}, "empty `output`"),
    (alpaca, {"instruction": CHAT, "output": "x"}, "`instruction` is of type list, not text"),
    (alpaca, {"instruction": "Do", "output": CHAT}, "`output` is of type list, not text"),
    (alpaca, {"instruction": "Do", "input": {"a": 1}, "output": "x"}, "`input` is of type dict, not text"),
    (alpaca, {"instruction": "Do", "output": float("nan")}, "`output` is of type float, not text"),
    (alpaca, {"instruction": "Do", "output": True}, "`output` is of type bool, not text"),
    (alpaca, {"instruction": "Do", "output": "x" * 1_000_001}, "`output` is longer than 1,000,000 characters"),
    (alpaca, {"instruction": "Do", "output": "\ud800"}, "`output` contains half a character (a lone surrogate)"),
    (alpaca, GOOD, "duplicate of an earlier row"),
    (preference, {**GOOD, "output_2": "one "}, "`output_1` and `output_2` are identical"),
    (preference, {**GOOD, "preference": 0}, "`preference` is a tie"),
    (preference, {**GOOD, "preference": None}, "`preference` is not between 1 and 2"),
    (preference, {**GOOD, "preference": "left"}, "`preference` is not between 1 and 2"),
    (preference, {**GOOD, "preference": [1]}, "`preference` is not between 1 and 2"),
    (preference, {**GOOD, "output_1": CHAT}, "`output_1` is of type list, not text"),
    (imdb, {"text": "Good.", "label": 1}, "`text` is shorter than two words"),
    (imdb, {"text": "Good film.", "label": 3}, "`label` is not one of 0, 1, neg, pos, negative, positive, -1, unsup"),
    (
        imdb,
        {"text": "Good film.", "label": {"a": 1}},
        "`label` is not one of 0, 1, neg, pos, negative, positive, -1, unsup",
    ),
    (imdb, {"review": "Good film."}, "no `text`"),
    (pairs, {**PAIR, "response_k": " So."}, "`response_j` and `response_k` are identical"),
    (pairs, {**PAIR, "question": None}, "no `question`"),
    (pairs, {**PAIR, "response_j": CHAT}, "`response_j` is of type list, not text"),
]


@pytest.mark.parametrize(("reader", "bad", "reason"), ROWS, ids=readable_id)
def test_a_bad_row_is_skipped_and_counted(tmp_path: Path, reader: Callable, bad: Any, reason: str) -> None:
    good = PAIR if reader is pairs else GOOD
    (tmp_path / "rows.jsonl").write_bytes(lines(good, bad))
    source, split = reader(tmp_path, "rows.jsonl"), SPLIT[reader]
    assert usable_rows(source, split) == 1
    assert source.report[split].counts == {reason: 1}


@pytest.mark.parametrize(("reader", "name", "content", "expected"), FILES, ids=readable_id)
def test_a_bad_file_is_one_sentence_or_counted(
    tmp_path: Path, reader: Callable, name: str, content: bytes, expected: str | tuple[int, int]
) -> None:
    (tmp_path / name).write_bytes(content)
    source, split = reader(tmp_path, name), SPLIT[reader]
    if isinstance(expected, tuple):
        assert (usable_rows(source, split), sum(source.report[split].counts.values())) == expected
        return
    with pytest.raises(DataError) as failure:
        usable_rows(source, split)
    assert_one_sentence(failure.value, expected)


PATHS = ["missing.jsonl", "folder.jsonl", "./missing", "x" * 300 + ".jsonl", "a\0b.jsonl", "~nobody/x.jsonl"]


@pytest.mark.parametrize("reader", [alpaca, dump], ids=["alpaca", "dump"])
@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name[:20]))
def test_a_path_that_is_no_file_is_refused_before_anything_is_read(tmp_path: Path, reader: Callable, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.xml").mkdir()
    if reader is dump:
        name = name.replace("jsonl", "xml")
    with pytest.raises(DataError) as failure:
        reader(tmp_path, name).check()
    assert_one_sentence(failure.value, "does not exist|is not a file")


def test_the_tables_keep_their_length() -> None:
    assert len(ROWS) + len(FILES) + 2 * len(PATHS) >= 85
