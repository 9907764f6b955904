"""Stack Exchange: scores by hand, records made of dumps and of pairs, and bad posts."""

import gzip
import json
from typing import Any

import pytest

from rlhf.data.posts import answer_score
from rlhf.errors import DataError
from tests.helpers.stack_exchange_dumps import answer, posts_xml, question, stack_exchange, write_dump


@pytest.mark.parametrize(
    ("votes", "accepted", "expected"),
    # log2(1 + votes): 0; 1; 1.58; 2; 2.32; 2.58; 3.46; 3.58; 6.66; 9.27
    [(0, False, 0), (1, False, 1), (2, False, 2), (3, False, 2), (4, False, 2), (5, False, 3), (10, False, 3),
     (11, False, 4), (100, False, 7), (617, False, 9), (0, True, 1), (1, True, 2), (5, True, 4),
     (-1, False, -1), (-7, False, -1), (-1, True, -1)],
)  # fmt: skip
def test_score_is_the_published_one(votes, accepted, expected):
    assert answer_score(votes, accepted) == expected


def test_a_dump_becomes_all_kinds_of_records(tmp_path):
    write_dump(
        tmp_path,
        question(1, "<p>Why <b>me</b>?</p>", AcceptedAnswerId=4, Title="A title"),
        answer(2, 1, 3),  # score 2
        answer(3, 1, 0),  # 0
        answer(4, 1, 1),  # 1 + 1 = 2, as answer 2, but later and with fewer votes
        answer(5, 1, -2),  # -1
    )
    prompt = "Question: Why **me**?\n\nAnswer: "
    assert stack_exchange(tmp_path, "sft").load("sft").to_list() == [{"prompt": prompt, "response": "Answer 2"}]
    assert stack_exchange(tmp_path, "prompts").load("prompts").to_list() == [
        {"prompt": prompt, "reference_output": "", "instruction": "Why **me**?"}
    ]
    assert stack_exchange(tmp_path, "eval").load("eval").to_list() == [
        {"prompt": prompt, "reference_output": "Answer 2", "instruction": "Why **me**?"}
    ]
    rows = stack_exchange(tmp_path, "preference").load("preference")
    assert set(rows["prompt"]) == {prompt}
    assert {(row["chosen"][-1], row["rejected"][-1]) for row in rows.to_list()} == {
        ("2", "3"), ("2", "5"), ("4", "3"), ("4", "5"), ("3", "5")
    }  # fmt: skip
    titled = stack_exchange(tmp_path, "prompts", title=True).load("prompts")
    assert titled["instruction"] == ["A title\n\nWhy **me**?"]


def test_an_answer_may_stand_before_its_question(tmp_path):
    write_dump(tmp_path, answer(9, 1, 5), question(2), question(1), answer(3, 2, 1))
    assert stack_exchange(tmp_path, "sft").load("sft")["response"] == ["Answer 9", "Answer 3"]


def test_at_most_so_many_pairs_drawn_by_the_seed(tmp_path):
    answers = [answer(id, 1, 2**id) for id in range(2, 12)]  # ten scores: 45 pairs
    write_dump(tmp_path, question(1), *answers)

    def pairs(**options: Any) -> list[tuple[str, str]]:
        rows = stack_exchange(tmp_path, "preference", **options).load("preference").to_list()
        return [(row["chosen"], row["rejected"]) for row in rows]

    assert len(set(pairs())) == 10
    assert all(int(chosen[7:]) > int(rejected[7:]) for chosen, rejected in pairs())
    assert pairs() == pairs() != pairs(seed=1)
    assert len(pairs(max_pairs_per_question=3)) == 3
    assert len(pairs(max_pairs_per_question=100)) == 45


def test_equal_scores_and_equal_texts_make_no_pair(tmp_path):
    write_dump(tmp_path, question(1), answer(2, 1, 2), answer(3, 1, 4), answer(4, 1, 9, "<p>Answer 2</p>"))
    rows = stack_exchange(tmp_path, "preference").load("preference").to_list()
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("Answer 2", "Answer 3")]
    write_dump(tmp_path, question(1), answer(2, 1, 2), answer(3, 1, 4))
    with pytest.raises(
        DataError, match=r"^preference: none of the 1 questions falls into its share and has two answers of dif"
    ):
        stack_exchange(tmp_path, "preference").load("preference")


def test_unanswered_questions_are_prompts_only(tmp_path):
    write_dump(tmp_path, question(1), question(2), answer(3, 2, 0))
    assert len(stack_exchange(tmp_path, "prompts").load("prompts")) == 2
    assert len(stack_exchange(tmp_path, "sft").load("sft")) == len(stack_exchange(tmp_path, "eval").load("eval")) == 1


def test_bad_rows_are_counted_by_reason_and_the_rest_is_accounted_for(tmp_path):
    write_dump(
        tmp_path,
        question(1),  # 1
        {"Id": 20, "PostTypeId": 5, "Body": "a tag"},  # 2
        answer(2, 1, 1),
        answer(3, 99, 1),  # 4: a question that does not exist
        answer(2, 1, 1),  # 5: a duplicate
        {"Id": 5, "PostTypeId": 2, "Score": 1, "Body": "x"},  # 6
        answer(6, 1, 1, "<p> </p>"),  # 7
        question(7) | {"Score": "many"},  # 8
        {"Id": 8, "Body": "x"},  # 9
        question(10, "<p></p>"),  # 10
        answer(11, 10, 1),  # 11
        question(12, AcceptedAnswerId="x"),  # 12
        answer(13, 13, 1),  # 13
        question(2**70),  # 14
    )
    data = stack_exchange(tmp_path, "sft")
    assert len(data.load("sft")) == 1
    report = data.report["sft"]
    assert report.counts == {
        "its question is missing or cannot be used": 2,
        "empty `Body`": 2,
        "no `ParentId`": 1,
        "`Score` is not an integer": 1,
        "no `PostTypeId`": 1,
        "`AcceptedAnswerId` is not an integer": 1,
        "answers itself": 1,
        "`Id` is out of range": 1,
        "duplicate `Id`": 1,
    }
    assert "Posts.xml: 2 of 14 rows skipped: its question is missing or cannot be used (rows 4, 11)" in report.lines()
    tally = report.tallies["Posts.xml"]
    assert tally.rows == tally.questions + tally.answers + tally.other + sum(report.counts.values()) == 14
    with pytest.raises(DataError, match=r"^Posts\.xml: \d of 14 rows skipped: .*data.on_bad_row=skip"):
        stack_exchange(tmp_path, "sft", on_bad_row="fail").load("sft")


MANY = posts_xml(*map(question, range(1, 900)))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("Posts.xml", posts_xml(question(1)).replace("</posts>", "").encode(),
         r"is not valid XML beyond row 1: no element"),
        ("Posts.xml", posts_xml(question(1), question(2, "&#0;")).replace("&amp;#0", "&#0").encode(),
         "XML beyond row 1"),
        ("Posts.xml", b"PK\x03\x04", "is not valid XML beyond row 0"),
        ("Posts.xml.gz", gzip.compress(MANY.encode())[:-20], r"cannot be read beyond row \d+: Compressed"),
        ("Posts.xml.gz", b"<posts/>", "cannot be read beyond row 0: Not a gzipped file"),
        ("Posts.xml", b"<posts/>", r"no question can be used \(no rows\)"),
        ("Posts.xml", posts_xml({"Id": 1, "PostId": 2}).encode(), r"can be used \(1 × no `PostTypeId`\)"),
    ],
)  # fmt: skip
def test_a_broken_dump_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        stack_exchange(tmp_path, "sft", sources=name).load("sft")


def pair(question: str, better: str, worse: str, **fields: Any) -> dict[str, Any]:
    return {"question": question, "response_j": better, "response_k": worse, **fields}


def test_pairs_are_gathered_by_question(tmp_path):
    rows = [pair("Q", "b", "c"), pair("R", "x", "y"), pair("Q", "a", "b"), pair("Q", "a", "b"), pair("Q", "a", "a"), 3]
    (tmp_path / "pairs.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    data = stack_exchange(tmp_path, "sft", sources="pairs.json.gz")
    assert {row["prompt"][10]: row["response"] for row in data.load("sft").to_list()} == {"Q": "a", "R": "x"}
    assert data.report["sft"].counts == {
        "`response_j` and `response_k` are identical": 1,
        "not a JSON object": 1,
        "duplicate of an earlier row": 1,
    }
    chosen = stack_exchange(tmp_path, "preference", sources="pairs.json.gz").load("preference").to_list()
    assert {(row["chosen"], row["rejected"]) for row in chosen} == {("b", "c"), ("a", "b"), ("x", "y")}
    one = stack_exchange(tmp_path, "preference", sources="pairs.json.gz", max_pairs_per_question=1).load("preference")
    assert len(one) == 2


def test_pairs_with_an_id_are_gathered_by_it(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([pair("Q", "a", "b", qid=1), pair("Q", "c", "d", qid=2)]))
    assert stack_exchange(tmp_path, "sft", sources="pairs.json").load("sft")["response"] == ["a", "c"]
