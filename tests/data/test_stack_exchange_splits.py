"""Stack Exchange: splits, several dumps, cache, memory and settings; the real dumps if they are available."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from rlhf.data.records import columns
from rlhf.data.splitting import Shares
from rlhf.errors import DataError
from tests.helpers.composed_config import composed_data
from tests.helpers.stack_exchange_dumps import SHARES, TEMPLATE, answer, question, stack_exchange, write_dump

ROOT = Path(__file__).parents[2]


def test_no_question_is_in_two_splits_and_shares_are_kept(tmp_path):
    rows = [row for id in range(1, 801, 4) for row in (question(id), answer(id + 1, id, 0), answer(id + 2, id, 5))]
    write_dump(tmp_path, *rows)
    data = stack_exchange(tmp_path, sources=["Posts.xml"])
    questions = {split: set(data.load(split)["prompt"]) for split in data.splits}
    assert tuple(questions) == tuple(SHARES)
    assert sum(map(len, questions.values())) == len(set().union(*questions.values())) == 200
    for split, share in SHARES.items():
        assert abs(len(questions[split]) / 200 - share) < 0.1
        assert data.load(split).column_names == columns(split)
    # posts added to a dump do not move the questions that were there before
    write_dump(tmp_path, *rows, question(900), answer(901, 900, 0))
    assert set(stack_exchange(tmp_path).load("eval")["prompt"]) >= questions["eval"]
    assert set(stack_exchange(tmp_path, seed=1).load("eval")["prompt"]) != questions["eval"]


def test_shares_have_no_overlap_when_one_grows():
    """Splits are in a fixed order: shrinking the last one does not move the questions of the first."""
    small, large = (Shares.parse({"sft": 0.5, "eval": share}, 0) for share in (0.1, 0.5))
    both = [(small.split_of(str(id)), large.split_of(str(id))) for id in range(1000)]
    assert {pair for pair in both if pair[0]} == {("sft", "sft"), ("eval", "eval")}
    assert {pair for pair in both if not pair[0]} == {(None, "eval")}


def test_several_dumps_are_read_in_order_up_to_max_rows(tmp_path):
    write_dump(tmp_path, question(1), answer(2, 1, 0))
    write_dump(tmp_path, question(1, "Other"), answer(2, 1, 0, "site"), name="Other.xml")
    both = ["Posts.xml", "Other.xml"]
    data = stack_exchange(tmp_path, "sft", sources=both)
    assert data.load("sft")["response"] == ["Answer 2", "site"]
    assert list(data.report["sft"].tallies) == both
    assert len(stack_exchange(tmp_path, "sft", sources=both, max_rows={"sft": 1}).load("sft")) == 1


def test_second_load_comes_from_the_cache_until_the_file_changes(tmp_path, monkeypatch):
    path = write_dump(tmp_path, question(1), answer(2, 1, 0))
    stack_exchange(tmp_path, "sft").load("sft")
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.data.posts.iterparse", lambda *_: pytest.fail("read again"))
        data = stack_exchange(tmp_path, "sft")
        assert data.load("sft")["response"] == ["Answer 2"]
        assert data.report["sft"].tallies["Posts.xml"].rows == 2
    write_dump(tmp_path, question(1), answer(2, 1, 0, "<p>Answer 3</p>"))  # the same size
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    assert stack_exchange(tmp_path, "sft").load("sft")["response"] == ["Answer 3"]


def test_nothing_temporary_is_left(tmp_path, datasets_cache):
    write_dump(tmp_path, question(1), answer(2, 1, 0))
    stack_exchange(tmp_path, "sft").load("sft")
    assert not list(datasets_cache.glob("stack_exchange-*"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"template": "x"}, "a mapping with the strings with_input"),
        ({"template": {"question": "{question}"}}, "a mapping with the strings with_input"),
        ({"template": TEMPLATE | {"without_input": "Q"}}, "template.without_input must use exactly {instruction}"),
        ({"shares": {}}, "allowed: a mapping from some of sft, "),
        ({"shares": {"train": 1}}, "allowed: a mapping from some of sft, "),
        ({"shares": {"sft": 0.8, "eval": 0.3}}, "add up to 1 at most"),
        ({"shares": {"sft": "x"}}, "add up to 1 at most"),
        ({"max_pairs_per_question": 0}, "max_pairs_per_question=0 is not allowed; allowed: a positive integer"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore' is not allowed; allowed: skip or fail"),
        ({"max_rows": 0}, "max_rows=0 is not allowed; allowed: a positive integer"),
        ({"sources": 3}, "3 is not a data source"),
    ],
)
def test_configuration_mistake_is_refused_before_anything_is_read(tmp_path, options, sentence):
    with pytest.raises(DataError) as failure:
        stack_exchange(tmp_path, **options)
    assert sentence in str(failure.value)


def test_check_names_the_path(tmp_path):
    with pytest.raises(DataError, match=r"^data\.sources: .*/Posts\.xml does not exist"):
        stack_exchange(tmp_path).check()
    with pytest.raises(DataError, match=r"^data\.shares has no share for eval; allowed: sft\.$"):
        stack_exchange(tmp_path, "sft").load("eval")
    (tmp_path / "Posts.xml").touch()
    with pytest.raises(DataError, match=r"^data\.sources: .*/Posts\.xml is empty"):
        stack_exchange(tmp_path).check()


def test_the_default_configuration_has_the_published_template(tmp_path):
    write_dump(tmp_path, question(1))
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
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")  # getrusage would report the peak of the parent
def test_memory_does_not_grow_with_the_dump(tmp_path):
    """Peak memory for dumps of 5, 10 and 20 MB. If posts were kept in memory, it would grow by tens of MB each time."""
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
        path = write_dump(tmp_path, *rows, name=f"{size}.xml")
        environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-c", PEAK, str(path)]
        printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.split()
        assert int(printed[0]) > size
        peaks.append(int(printed[1]) / 1024)
    assert all(larger - smaller < 12 for smaller, larger in pairwise(peaks)), peaks


@pytest.mark.real
@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA names no folder")
def test_the_real_dumps_can_be_read():
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
