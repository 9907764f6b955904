"""Rows with nothing, or next to nothing, left to learn after cutting to `max_length`."""

import logging

import pytest

from rlhf.errors import DataError
from rlhf.stages.cutting import FEW, count_short, distinct

EOS = 1
SAME = (([5, 6], [7]), ([5, 6], [7]))
DIFFERENT = (([5, 6], [7, EOS]), ([5, 6], [8, EOS]))


def test_pairs_that_cutting_makes_equal_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows, pairs, counts = distinct("abc", [SAME, DIFFERENT, SAME], "preference", "reward.max_length=3")
    assert (rows, pairs) == (["b"], [DIFFERENT])
    assert counts == {"chosen and rejected are equal within reward.max_length=3 tokens": 2}
    assert "2 of 3 pairs are left out" in caplog.text
    with pytest.raises(DataError, match=r"reward\.max_length=3 tokens, .* equal in all 1 pairs"):
        distinct("a", [SAME], "preference", "reward.max_length=3")
    assert distinct("a", [DIFFERENT], "preference", "reward.max_length=3") == (["a"], [DIFFERENT], {})


def test_of_one_prompt_an_answer_that_begins_like_the_other_differs_by_its_end() -> None:
    pair = (([5, 6], [7, EOS]), ([5, 6], [7, 8]))  # the second response is cut, so that its end is not a target
    assert distinct("a", [pair], "preference", "reward.max_length=4")[1] == [pair]


def test_only_responses_that_were_cut_count_as_short(caplog: pytest.LogCaptureFixture) -> None:
    whole, cut, long = ([5] * 9, [EOS]), ([5] * 9, [7]), ([5] * (10 - FEW), [7] * FEW)
    early = ([5], [7])  # sampled without an end, but not cut here
    with caplog.at_level(logging.WARNING):
        assert count_short([whole, cut, cut, long, early], 10, EOS, "sft", "sft.max_length=10") == {
            "fewer than 4 response tokens within sft.max_length=10 tokens": 2
        }
    assert "2 of 5 responses keep fewer than 4 tokens" in caplog.text
    assert count_short([whole, long], 10, EOS, "sft", "sft.max_length=10") == {}
