"""Stack Exchange: scores by hand, dumps and pairs joined, splits apart, memory bounded; the real dumps if there."""

import gzip
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from rlhf.data.markdown import to_markdown
from rlhf.data.posts import answer_score
from rlhf.data.records import columns
from rlhf.data.splitting import Shares
from rlhf.data.stack_exchange import StackExchange
from rlhf.errors import DataError
from tests.helpers.composed_config import composed_data

ROOT = Path(__file__).parents[2]
TEMPLATE = {"with_input": "{instruction}{input}", "without_input": "Question: {instruction}\n\nAnswer: "}
SHARES = {"sft": 0.3, "preference": 0.3, "preference_validation": 0.1, "prompts": 0.2, "eval": 0.1}


def xml(*rows: dict[str, Any]) -> str:
    lines = (
        "  <row " + " ".join(f"{key}={quoteattr(str(value))}" for key, value in row.items()) + " />" for row in rows
    )
    return "\n".join(['\ufeff<?xml version="1.0" encoding="utf-8"?>', "<posts>", *lines, "</posts>"])


def question(id: int, body: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"Id": id, "PostTypeId": 1, "Score": 1, "Body": body or f"<p>Question {id}</p>", **fields}


def answer(id: int, parent: int, votes: int, body: str | None = None) -> dict[str, Any]:
    body = body or f"<p>Answer {id}</p>"
    return {"Id": id, "PostTypeId": 2, "ParentId": parent, "Score": votes, "Body": body}


def dump(folder: Path, *rows: dict[str, Any], name: str = "Posts.xml") -> Path:
    (folder / name).write_text(xml(*rows), encoding="utf-8")
    return folder / name


def source(root: Path, only: str = "", **options: Any) -> StackExchange:
    """All questions in the split `only`, or `SHARES`."""
    shares = {only: 1} if only else SHARES
    return StackExchange(
        **{"root": str(root), "template": TEMPLATE, "sources": "Posts.xml", "shares": shares} | options
    )


@pytest.mark.parametrize(
    ("votes", "accepted", "expected"),
    # log2(1 + votes): 0; 1; 1.58; 2; 2.32; 2.58; 3.46; 3.58; 6.66; 9.27
    [(0, False, 0), (1, False, 1), (2, False, 2), (3, False, 2), (4, False, 2), (5, False, 3), (10, False, 3),
     (11, False, 4), (100, False, 7), (617, False, 9), (0, True, 1), (1, True, 2), (5, True, 4),
     (-1, False, -1), (-7, False, -1), (-1, True, -1)],
)  # fmt: skip
def test_score_is_the_published_one(votes, accepted, expected):
    assert answer_score(votes, accepted) == expected


def test_markdown_keeps_code_and_formulas():
    html = (
        "<p>Let <em>$a_1 * b_2$</em> &lt; <code>x_y</code>:</p>\n<pre class='lang-c'><code>    int *p;\n\n"
        "if (a &lt; b &amp;&amp; c) {\n\treturn 1;\n}\n</code></pre>\n<ul><li>one</li></ul>"
        "<p><a href='http://a.b/c_d'>link</a><br>end</p>"
    )
    assert to_markdown(html) == (
        "Let *$a_1 * b_2$* < `x_y`:\n\n```\n    int *p;\n\nif (a < b && c) {\n\treturn 1;\n}\n```\n\n* one\n\n"
        "[link](http://a.b/c_d)  \nend"
    )


def test_a_dump_becomes_all_kinds_of_records(tmp_path):
    dump(
        tmp_path,
        question(1, "<p>Why <b>me</b>?</p>", AcceptedAnswerId=4, Title="A title"),
        answer(2, 1, 3),  # score 2
        answer(3, 1, 0),  # 0
        answer(4, 1, 1),  # 1 + 1 = 2, later than answer 2 and with fewer votes
        answer(5, 1, -2),  # -1
    )
    prompt = "Question: Why **me**?\n\nAnswer: "
    assert source(tmp_path, "sft").load("sft").to_list() == [{"prompt": prompt, "response": "Answer 2"}]
    assert source(tmp_path, "prompts").load("prompts").to_list() == [
        {"prompt": prompt, "reference_output": "", "instruction": "Why **me**?"}
    ]
    assert source(tmp_path, "eval").load("eval").to_list() == [
        {"prompt": prompt, "reference_output": "Answer 2", "instruction": "Why **me**?"}
    ]
    rows = source(tmp_path, "preference").load("preference")
    assert set(rows["prompt"]) == {prompt}
    assert {(row["chosen"][-1], row["rejected"][-1]) for row in rows.to_list()} == {
        ("2", "3"), ("2", "5"), ("4", "3"), ("4", "5"), ("3", "5")
    }  # fmt: skip
    titled = source(tmp_path, "prompts", title=True).load("prompts")
    assert titled["instruction"] == ["A title\n\nWhy **me**?"]


def test_an_answer_may_stand_before_its_question(tmp_path):
    dump(tmp_path, answer(9, 1, 5), question(2), question(1), answer(3, 2, 1))
    assert source(tmp_path, "sft").load("sft")["response"] == ["Answer 9", "Answer 3"]


def test_at_most_so_many_pairs_drawn_by_the_seed(tmp_path):
    answers = [answer(id, 1, 2**id) for id in range(2, 12)]  # ten scores: 45 pairs
    dump(tmp_path, question(1), *answers)

    def pairs(**options: Any) -> list[tuple[str, str]]:
        rows = source(tmp_path, "preference", **options).load("preference").to_list()
        return [(row["chosen"], row["rejected"]) for row in rows]

    assert len(set(pairs())) == 10
    assert all(int(chosen[7:]) > int(rejected[7:]) for chosen, rejected in pairs())
    assert pairs() == pairs() != pairs(seed=1)
    assert len(pairs(max_pairs_per_question=3)) == 3
    assert len(pairs(max_pairs_per_question=100)) == 45


def test_equal_scores_and_equal_texts_make_no_pair(tmp_path):
    dump(tmp_path, question(1), answer(2, 1, 2), answer(3, 1, 4), answer(4, 1, 9, "<p>Answer 2</p>"))
    rows = source(tmp_path, "preference").load("preference").to_list()
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("Answer 2", "Answer 3")]
    dump(tmp_path, question(1), answer(2, 1, 2), answer(3, 1, 4))
    with pytest.raises(
        DataError, match=r"^preference: none of the 1 questions falls into its share and has two answers of dif"
    ):
        source(tmp_path, "preference").load("preference")


def test_unanswered_questions_are_prompts_only(tmp_path):
    dump(tmp_path, question(1), question(2), answer(3, 2, 0))
    assert len(source(tmp_path, "prompts").load("prompts")) == 2
    assert len(source(tmp_path, "sft").load("sft")) == len(source(tmp_path, "eval").load("eval")) == 1


def test_bad_rows_are_counted_by_reason_and_the_rest_is_accounted_for(tmp_path):
    dump(
        tmp_path,
        question(1),  # 1
        {"Id": 20, "PostTypeId": 5, "Body": "a tag"},  # 2
        answer(2, 1, 1),
        answer(3, 99, 1),  # 4: no such question
        answer(2, 1, 1),  # 5: again
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
    data = source(tmp_path, "sft")
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
    with pytest.raises(DataError, match=r"^Posts\.xml: \d of 14 rows skipped: .*`on_bad_row: skip`"):
        source(tmp_path, "sft", on_bad_row="fail").load("sft")


MANY = xml(*map(question, range(1, 900)))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("Posts.xml", xml(question(1)).replace("</posts>", "").encode(), r"is not valid XML beyond row 1: no element"),
        ("Posts.xml", xml(question(1), question(2, "&#0;")).replace("&amp;#0", "&#0").encode(), "XML beyond row 1"),
        ("Posts.xml", b"PK\x03\x04", "is not valid XML beyond row 0"),
        ("Posts.xml.gz", gzip.compress(MANY.encode())[:-20], r"cannot be read beyond row \d+: Compressed"),
        ("Posts.xml.gz", b"<posts/>", "cannot be read beyond row 0: Not a gzipped file"),
        ("Posts.xml", b"<posts/>", r"no question can be used \(no rows\)"),
        ("Posts.xml", xml({"Id": 1, "PostId": 2}).encode(), r"can be used \(1 × no `PostTypeId`\)"),
    ],
)  # fmt: skip
def test_a_broken_dump_is_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        source(tmp_path, "sft", sources=name).load("sft")


def pair(question: str, better: str, worse: str, **fields: Any) -> dict[str, Any]:
    return {"question": question, "response_j": better, "response_k": worse, **fields}


def test_pairs_are_gathered_by_question(tmp_path):
    rows = [pair("Q", "b", "c"), pair("R", "x", "y"), pair("Q", "a", "b"), pair("Q", "a", "b"), pair("Q", "a", "a"), 3]
    (tmp_path / "pairs.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    data = source(tmp_path, "sft", sources="pairs.json.gz")
    assert {row["prompt"][10]: row["response"] for row in data.load("sft").to_list()} == {"Q": "a", "R": "x"}
    assert data.report["sft"].counts == {
        "`response_j` and `response_k` are identical": 1,
        "not a JSON object": 1,
        "duplicate of an earlier row": 1,
    }
    chosen = source(tmp_path, "preference", sources="pairs.json.gz").load("preference").to_list()
    assert {(row["chosen"], row["rejected"]) for row in chosen} == {("b", "c"), ("a", "b"), ("x", "y")}
    one = source(tmp_path, "preference", sources="pairs.json.gz", max_pairs_per_question=1).load("preference")
    assert len(one) == 2


def test_pairs_with_an_id_are_gathered_by_it(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([pair("Q", "a", "b", qid=1), pair("Q", "c", "d", qid=2)]))
    assert source(tmp_path, "sft", sources="pairs.json").load("sft")["response"] == ["a", "c"]


def test_no_question_is_in_two_splits_and_shares_are_kept(tmp_path):
    rows = [row for id in range(1, 801, 4) for row in (question(id), answer(id + 1, id, 0), answer(id + 2, id, 5))]
    dump(tmp_path, *rows)
    data = source(tmp_path, sources=["Posts.xml"])
    questions = {split: set(data.load(split)["prompt"]) for split in data.splits}
    assert tuple(questions) == tuple(SHARES)
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 200
    for split, share in SHARES.items():
        assert abs(len(questions[split]) / 200 - share) < 0.1
        assert data.load(split).column_names == columns(split)
    # what joins a dump later changes nothing for the questions that were there
    dump(tmp_path, *rows, question(900), answer(901, 900, 0))
    assert set(source(tmp_path).load("eval")["prompt"]) >= questions["eval"]
    assert set(source(tmp_path, seed=1).load("eval")["prompt"]) != questions["eval"]


def test_shares_have_no_overlap_when_one_grows():
    """The order of the splits is fixed: cutting the last one leaves the first where it was."""
    small, large = (Shares.parse({"sft": 0.5, "eval": share}, 0) for share in (0.1, 0.5))
    both = [(small.split_of(str(id)), large.split_of(str(id))) for id in range(1000)]
    assert {pair for pair in both if pair[0]} == {("sft", "sft"), ("eval", "eval")}
    assert {pair for pair in both if not pair[0]} == {(None, "eval")}


def test_several_dumps_and_max_rows(tmp_path):
    dump(tmp_path, question(1), answer(2, 1, 0))
    dump(tmp_path, question(1, "Other"), answer(2, 1, 0, "site"), name="Other.xml")
    both = ["Posts.xml", "Other.xml"]
    data = source(tmp_path, "sft", sources=both)
    assert data.load("sft")["response"] == ["Answer 2", "site"]
    assert list(data.report["sft"].tallies) == both
    assert len(source(tmp_path, "sft", sources=both, max_rows={"sft": 1}).load("sft")) == 1


def test_second_load_comes_from_the_cache_until_the_file_changes(tmp_path, monkeypatch):
    path = dump(tmp_path, question(1), answer(2, 1, 0))
    source(tmp_path, "sft").load("sft")
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.data.posts.iterparse", lambda *_: pytest.fail("read again"))
        data = source(tmp_path, "sft")
        assert data.load("sft")["response"] == ["Answer 2"]
        assert data.report["sft"].tallies["Posts.xml"].rows == 2
    dump(tmp_path, question(1), answer(2, 1, 0, "<p>Answer 3</p>"))  # the same size
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert source(tmp_path, "sft").load("sft")["response"] == ["Answer 3"]


def test_nothing_temporary_is_left(tmp_path, datasets_cache):
    dump(tmp_path, question(1), answer(2, 1, 0))
    source(tmp_path, "sft").load("sft")
    assert not list(datasets_cache.glob("stack_exchange-*"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"template": "x"}, "allowed: a mapping with the strings with_input"),
        ({"template": {"question": "{question}"}}, "allowed: a mapping with the strings with_input"),
        ({"template": TEMPLATE | {"without_input": "Q"}}, "template.without_input must use exactly {instruction}"),
        ({"shares": {}}, "allowed: a mapping from some of sft, "),
        ({"shares": {"train": 1}}, "allowed: a mapping from some of sft, "),
        ({"shares": {"sft": 0.8, "eval": 0.3}}, "add up to 1 at most"),
        ({"shares": {"sft": "x"}}, "add up to 1 at most"),
        ({"max_pairs_per_question": 0}, "max_pairs_per_question=0 is not allowed; allowed: a positive integer"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore' is not allowed"),
        ({"max_rows": 0}, "max_rows=0 is not allowed"),
        ({"sources": 3}, "3 is not a data source"),
    ],
)
def test_configuration_mistake_is_refused_before_anything_is_read(tmp_path, options, sentence):
    with pytest.raises(DataError) as failure:
        source(tmp_path, **options)
    assert sentence in str(failure.value)


def test_check_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"^data\.sources: .*/Posts\.xml does not exist"):
        source(tmp_path).check()
    with pytest.raises(DataError, match=r"^data\.shares has no share for eval; allowed: sft\.$"):
        source(tmp_path, "sft").load("eval")
    (tmp_path / "Posts.xml").touch()
    with pytest.raises(DataError, match=r"^data\.sources: .*/Posts\.xml is empty"):
        source(tmp_path).check()


def test_the_default_configuration_has_the_published_template(tmp_path):
    dump(tmp_path, question(1))
    only = [
        "data.shares.sft=0",
        "data.shares.preference=0",
        "data.shares.preference_validation=0",
        "data.shares.eval=0",
    ]
    data = composed_data("stack_exchange", f"data.root={tmp_path}", *only, "data.shares.prompts=1")
    data.check()
    assert data.load("prompts")["prompt"] == ["Question: Question 1\n\nAnswer: "]


PEAK = r"""
import re, sys, datasets
from rlhf.data.stack_exchange import StackExchange
data = StackExchange(template={"with_input": "{instruction}{input}", "without_input": "{instruction}"},
                     sources=sys.argv[1], shares={"sft": 0.5, "preference": 0.5})
print(sum(len(data.load(split)) for split in data.splits))
print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")  # getrusage would tell the peak of the parent
def test_memory_does_not_grow_with_the_dump(tmp_path):
    """Peak memory on 5, 10 and 20 MB: if the posts were held, it would grow by tens of megabytes each time."""
    peaks = []
    for size in (400, 800, 1600):
        rows = [
            row
            for id in range(1, 4 * size, 4)
            for row in (
                question(id),
                *(answer(id + k, id, k, "<p>" + f"{id} {k} word " * 300 + "</p>") for k in (1, 2, 3)),
            )
        ]
        path = dump(tmp_path, *rows, name=f"{size}.xml")
        environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-c", PEAK, str(path)]
        printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
        assert int(printed[0]) > size
        peaks.append(int(printed[1]) / 1024)
    assert all(larger - smaller < 12 for smaller, larger in pairwise(peaks)), peaks


@pytest.mark.real
@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA names no folder")
def test_real_dumps():
    folder = Path(os.environ["RLHF_REAL_DATA"], "stack_exchange")
    dumps = [
        f"{site}_Posts.xml.gz"
        for site in ("ai_2017-03", "beer_2017-03", "matheducators_2014-05", "stackoverflow_first_2008-08")
    ]
    data = composed_data("stack_exchange", f"data.root={folder}", f"data.sources=[{','.join(dumps)}]")
    data.check()
    assert {split: len(data.load(split)) for split in data.splits} == {
        "sft": 504, "preference": 1126, "preference_validation": 199, "prompts": 555, "eval": 88
    }  # fmt: skip
    tallies = data.report["sft"].tallies.values()
    assert [(t.rows, t.questions, t.answers, t.pairs) for t in tallies] == [
        (1735, 604, 1004, 597), (2354, 663, 1572, 1267), (2061, 397, 1507, 1471), (620, 173, 447, 410)
    ]  # fmt: skip
    assert data.report["sft"].counts == {}
    assert any("```" in response for response in data.load("sft")["response"])
    pairs = composed_data("stack_exchange", 
        f"data.root={folder}", "data.sources=torchtune_stack_exchange_paired_tiny.json.gz",
        "data.shares={sft:0.5,preference:0.5,preference_validation:0,prompts:0,eval:0}",
    )  # fmt: skip
    assert len(pairs.load("sft")) + len(set(pairs.load("preference")["prompt"])) == 8
