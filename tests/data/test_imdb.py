"""IMDb: cleaning, disjoint splits, prompts continued by their references, labels; the real reviews if available."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.imdb import Imdb
from rlhf.data.records import Demonstration, columns, skipped_rows
from rlhf.errors import DataError
from rlhf.models.sequences import pack
from rlhf.models.tokenizing import encode_pairs
from tests.helpers.composed_config import composed_data

ROOT = Path(__file__).parents[2]
SHARES = {"sft": 0.6, "prompts": 0.3, "eval": 0.1}


def reviews(root: Path, rows: list[Any], only: str = "", **options: Any) -> Imdb:
    """Make an `Imdb` with all reviews in the split `only`, or train_and_held_out by `SHARES`."""
    (root / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shares = {only: 1} if only else SHARES
    return Imdb(**{"root": str(root), "reviews": "reviews.jsonl", "shares": shares} | options)


def review(text: str, label: Any = 1) -> dict[str, Any]:
    return {"text": text, "label": label}


MANY = [
    review(" ".join(f"{word}{row}" for word in ("one", "two", "three", "four", "five")), row % 2) for row in range(300)
]


def test_markup_is_removed(tmp_path):
    raw = " Good.<br /><br />Bad?<br>\tUgly <BR/> end <i>x</i> \n"
    assert reviews(tmp_path, [review(raw)], "sft").load("sft").to_list() == [
        {"prompt": "", "response": "Good.\n\nBad?\nUgly\nend <i>x</i>"}
    ]


def test_prompts_are_first_words_and_references_continue_them(tmp_path):
    texts = {row["text"] for row in MANY}
    rows = reviews(tmp_path, MANY, "eval", prompt_words=[1, 3]).load("eval").to_list()
    assert {row["prompt"] + row["reference_output"] for row in rows} == texts
    lengths = [len(row["prompt"].split()) for row in rows]
    assert all(lengths.count(length) > 60 for length in (1, 2, 3))
    assert len(set(lengths)) == 3
    assert all(row["instruction"] == row["prompt"] == row["prompt"].rstrip() for row in rows)
    prompts = reviews(tmp_path, MANY, "prompts", prompt_words=[1, 3]).load("prompts").to_list()
    assert prompts == [row | {"reference_output": ""} for row in rows]
    other = reviews(tmp_path, MANY, "eval", prompt_words=[1, 3], seed=1).load("eval")["prompt"]
    assert set(other) != {row["prompt"] for row in rows}


def test_at_least_one_word_is_left_to_the_reference(tmp_path):
    rows = reviews(tmp_path, [review("Just  this\nfilm"), review("One two")], "eval", prompt_words=[8, 8]).load("eval")
    assert rows["prompt"] == ["Just  this", "One"]
    assert rows["reference_output"] == ["\nfilm", " two"]


def test_a_summary_is_told_of_bad_rows(tmp_path):
    data = reviews(tmp_path, [*MANY, MANY[0], MANY[7], review("short")], "sft")
    assert skipped_rows(data, "sft") == {}  # nothing has been read yet
    data.load("sft")
    assert skipped_rows(data, "sft") == {"duplicate of an earlier row": 2, "`text` is shorter than two words": 1}


def test_no_review_is_in_two_splits(tmp_path):
    data = reviews(tmp_path, [*MANY, MANY[0], review(f"{MANY[1]['text']} <br />")])
    texts = {
        "sft": set(data.load("sft")["response"]),
        "prompts": set(data.labelled("prompts")["text"]),
        "eval": {row["prompt"] + row["reference_output"] for row in data.load("eval").to_list()},
    }
    assert data.splits == tuple(texts)
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 300
    for split, share in SHARES.items():
        assert abs(len(texts[split]) / 300 - share) < 0.1
        assert data.load(split).column_names == columns(split)
        assert len(data.labelled(split)) == len(data.load(split))
    assert data.report["eval"].counts == {"duplicate of an earlier row": 2}


def test_labels_in_several_notations_are_read(tmp_path):
    rows = [review("a b", 0), review("c d", 1), review("e f", "pos"), review("g h", "Negative"), review("i j", "1"),
            review("k l", -1), {"text": "m n"}, review("o p", 2), review("q r", True), review("s t", 0.5)]  # fmt: skip
    data = reviews(tmp_path, rows, "sft")
    labelled = {row["text"]: row["label"] for row in data.labelled("sft").to_list()}
    assert labelled == {"a b": 0, "c d": 1, "e f": 1, "g h": 0, "i j": 1}
    assert len(data.load("sft")) == 7  # labels do not matter in that split
    assert data.report["sft"].counts == {"`label` is not one of 0, 1, neg, pos, negative, positive, -1, unsup": 3}
    with pytest.raises(DataError, match=r"^sft: none of the 1 reviews falls into its share and is labelled\.$"):
        reviews(tmp_path, [{"text": "m n"}], "sft").labelled("sft")


def test_bad_rows_are_counted(tmp_path):
    rows = [review("a b"), review("single"), review("<br /> <br />"), review(""), {"label": 1}, 7]
    data = reviews(tmp_path, rows, "sft")
    assert len(data.load("sft")) == 1
    assert data.report["sft"].counts == {
        "`text` is shorter than two words": 2, "empty `text`": 1, "no `text`": 1, "not a JSON object": 1
    }  # fmt: skip
    with pytest.raises(DataError, match=r"reviews\.jsonl, row 2: `text` is shorter than two words"):
        reviews(tmp_path, rows, "sft", on_bad_row="fail").load("sft")


def test_an_empty_split_is_fatal(tmp_path):
    data = reviews(tmp_path, MANY[:3], shares={"sft": 0.999, "eval": 0.001})
    with pytest.raises(DataError, match=r"^eval: none of the 3 reviews falls into its share\.$"):
        data.load("eval")


def test_reviews_can_come_from_a_csv_file(tmp_path):
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ['A "b",\nc', 0], ["None of it", 1]])
    data = Imdb(root=str(tmp_path), reviews="reviews.csv", shares={"sft": 1})
    assert data.labelled("sft").to_list() == [{"text": 'A "b",\nc', "label": 0}, {"text": "None of it", "label": 1}]


def test_the_first_rows_of_a_file_sorted_by_label_have_both_labels(tmp_path):
    rows = sorted(MANY, key=lambda row: row["label"])
    for split in ("sft", "eval"):
        labels = reviews(tmp_path, rows, split).labelled(split)["label"][:40]
        assert 10 < sum(labels) < 30
    data = reviews(tmp_path, rows, "eval", prompt_words=[5, 5], max_rows=40)
    labels = [row["label"] for prompt in data.load("eval")["prompt"] for row in rows if row["text"].startswith(prompt)]
    assert 10 < sum(labels) < 30
    again = reviews(tmp_path, rows, "eval", prompt_words=[5, 5], max_rows=40)
    assert again.load("eval").to_list() == data.load("eval").to_list()


def test_max_rows_takes_the_first(tmp_path):
    data = reviews(tmp_path, MANY, max_rows={"sft": 5})
    assert (len(data.load("sft")), len(data.labelled("sft"))) == (5, 5)
    assert len(data.load("prompts")) > 5


def test_an_empty_prompt_trains_on_the_whole_review(make_tokenizer):
    """The targets are the end and all tokens but the first, which nothing predicts, with or without packing."""
    from rlhf.models.sequences import Sequences

    rows = [Demonstration("", "w3 w4 w5"), Demonstration("", "w6 w7")]
    encoded = encode_pairs(make_tokenizer(), [row.prompt for row in rows], [row.response for row in rows], 10)
    assert encoded == [([], [3, 4, 5, 1]), ([], [6, 7, 1])]
    batch = Sequences.from_lists(*map(list, zip(*encoded, strict=True)))
    assert batch.target_ids.tolist() == [4, 5, 1, 7, 1]
    assert int(batch.predicting.sum()) == 5
    packed = pack(batch, 10)
    assert packed.target_ids.tolist() == [4, 5, 1, 7, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt_words": [8, 2]}, "is not allowed; allowed: [fewest, most]"),
        ({"prompt_words": [0, 2]}, "is not allowed; allowed: [fewest, most]"),
        ({"prompt_words": 4}, "is not allowed; allowed: [fewest, most]"),
        ({"prompt_words": [2.0, 4]}, "is not allowed; allowed: [fewest, most]"),
        ({"shares": {"preference": 1}}, "allowed: a mapping from some of sft, sft_validation, prompts, eval"),
        ({"on_bad_row": "x"}, "on_bad_row='x' is not allowed"),
        ({"max_rows": -1}, "max_rows=-1 is not allowed"),
        ({"reviews": 3}, "3 is not a data source"),
    ],
)
def test_configuration_mistake_is_refused_before_anything_is_read(tmp_path, options, sentence):
    with pytest.raises(DataError) as failure:
        reviews(tmp_path, MANY, **options)
    assert sentence in str(failure.value)


def test_check_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"^data\.reviews: .*/nosuch\.csv does not exist"):
        reviews(tmp_path, MANY, reviews="nosuch.csv").check()


@pytest.mark.real
@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA names no folder")
def test_the_real_reviews_can_be_read():
    data = composed_data("imdb", f"data.root={os.environ['RLHF_REAL_DATA']}", "data.reviews=imdb/imdb_train.jsonl.gz")
    data.check()
    counts = {split: len(data.load(split)) for split in data.splits}
    assert data.report["sft"].counts == {"duplicate of an earlier row": 98}
    assert counts == {"sft": 14862, "prompts": 7554, "eval": 2486}
    assert not any("<br" in text for text in data.load("sft")["response"])
    assert set(map(len, map(str.split, data.load("prompts")["prompt"]))) == {2, 3, 4, 5, 6, 7, 8}
    assert 0.45 < sum(data.labelled("eval")["label"]) / counts["eval"] < 0.55
