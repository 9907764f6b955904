"""The farm's splits: who demonstrations are about, and which responses are compared."""

import math
import statistics
from collections import Counter

import pytest

from rlhf.data.farm import Farm
from rlhf.data.farm.dataset import GROUPS
from rlhf.data.farm.judge import analyze
from rlhf.data.farm.writers import EDITS
from rlhf.data.records import Split, as_records, count_rows
from rlhf.errors import DataError
from rlhf.stages.pairs import encode_comparisons, grouped

COMPARISONS = 560
FARM = Farm(people=144, fame=0.85, responses=8, comparisons=COMPARISONS, held_out_comparisons=1000)


def share_told(farm: Farm, group: str) -> float:
    """The share of all facts about the people of a group (or "" for crafts) that demonstrations tell."""
    told = set()
    for row in farm.load("sft").to_list():
        task = farm.tasks.by_instruction[row["prompt"].strip()]
        told |= {(task.subject, fact) for fact in analyze(farm.world, task, row["response"]).facts}
    subjects = {task.subject for prompt, task in farm.tasks.by_instruction.items() if farm.group(prompt) == group}
    return statistics.mean((subject, fact) in told for subject in subjects for fact in subject.truth.items())


def test_demonstrations_tell_all_about_the_famous_and_little_about_the_obscure():
    famous, known, obscure = (share_told(Farm(people=144, fame=1.2), group) for group in GROUPS)
    assert famous == 1
    assert famous > known > obscure > 0.4
    assert share_told(FARM, "") == share_told(Farm(people=144), "") == 1


def test_demonstrations_follow_the_power_law_and_nothing_else_does():
    def count(farm: Farm, split: Split, group: str) -> int:
        return sum(farm.group(row["prompt"]) == group for row in farm.load(split).to_list())

    for fame in (0.4, 1.0):
        farm = Farm(people=144, fame=fame, responses=8, demonstrations=4000, comparisons=COMPARISONS)
        weights = [rank**-fame for rank in range(1, 145)]
        people = sum(count(farm, "sft", group) for group in GROUPS)
        assert count(farm, "sft", "famous") / people == pytest.approx(sum(weights[:48]) / sum(weights), abs=0.03)
        for split in ("preference", "prompts", "eval"):
            assert farm.load(split).to_list() == FARM.load(split).to_list()
    assert count(FARM, "prompts", "famous") == pytest.approx(count(FARM, "prompts", "obscure"), rel=0.15)


def test_groups_are_thirds_of_the_people_by_fame():
    groups = [FARM.group(f"Who is {person.name}?") for person in FARM.world.people]
    assert groups == [name for name in GROUPS for _ in range(48)]
    assert FARM.group("How do I make cheese?") == ""
    assert FARM.groups == GROUPS


def test_without_a_long_tail_nobody_is_famous():
    flat = Farm(people=144)
    assert flat.groups == ()
    assert {flat.group(f"Who is {person.name}?") for person in flat.world.people} == {""}


@pytest.mark.parametrize(("responses", "tokens"), [(2, 0), (8, 1)])
def test_comparisons_that_are_cut_too_short_to_differ_are_refused_before_any_model_is_made(responses: int, tokens: int):
    short = Farm(people=4, max_response_tokens=tokens, responses=responses)
    for attempt in (short.check, lambda: short.load("preference")):
        with pytest.raises(DataError, match=rf"^data\.max_response_tokens={tokens}: .*different.*; allowed: ") as told:
            attempt()
        assert "\n" not in str(told.value)
    Farm(people=4, max_response_tokens=6, responses=responses).check()


@pytest.mark.parametrize("responses", [2, 5, 8])
def test_all_responses_to_a_prompt_are_compared_one_pair_after_the_other(responses: int):
    pairs = math.comb(responses, 2)
    rows = Farm(people=144, responses=responses, comparisons=20 * pairs + 1).load("preference").to_list()
    assert len(rows) == 20 * pairs + 1
    for start in range(0, 20 * pairs, pairs):
        group = rows[start : start + pairs]
        assert len({row["prompt"] for row in group}) == 1
        assert len({text for row in group for text in (row["chosen"], row["rejected"])}) == responses
        assert len({frozenset((row["chosen"], row["rejected"])) for row in group}) == pairs


def votes_by_pair(farm: Farm) -> Counter[tuple[str, frozenset[str]]]:
    """How many annotators compared each pair of responses to a prompt."""
    votes: Counter[tuple[str, frozenset[str]]] = Counter()
    for row in farm.load("preference").to_list():
        votes[row["prompt"], frozenset((row["chosen"], row["rejected"]))] += row["votes"]
    return votes


def test_several_annotators_compare_a_response_with_its_edit():
    """Each has a verdict of their own; all other pairs have one."""
    farm = Farm(people=144, responses=8, comparisons=20 * 28, edit_annotations=5)
    votes = votes_by_pair(farm)
    assert len(votes) == 20 * 28
    assert set(votes.values()) == {1, 5}
    assert 20 * 3 <= sum(count == 5 for count in votes.values()) <= 20 * 4  # some edits change nothing
    verdicts = {(row["prompt"], row["chosen"], row["rejected"]) for row in farm.load("preference").to_list()}
    assert any((prompt, rejected, chosen) in verdicts for prompt, chosen, rejected in verdicts)  # annotators disagree


def test_several_annotators_compare_every_pair():
    votes = votes_by_pair(Farm(people=144, comparisons=50, annotations=3))
    assert len(votes) == 50
    assert set(votes.values()) == {3}
    votes = votes_by_pair(Farm(people=144, responses=8, comparisons=20 * 28, annotations=2, edit_annotations=6))
    assert len(votes) == 20 * 28
    assert set(votes.values()) == {2, 6}


def test_a_verdict_is_a_record_for_each_of_its_votes():
    rows = Farm(responses=8, comparisons=10 * 28, annotations=4).load("preference")
    records = as_records(rows, "preference")
    assert len(records) == count_rows(rows, "preference") == 10 * 28 * 4 > len(rows)
    counted = Counter((record.prompt, record.chosen, record.rejected) for record in records)
    assert counted == {(row["prompt"], row["chosen"], row["rejected"]): row["votes"] for row in rows.to_list()}
    pairs = encode_comparisons(FARM.tokenizer(), records, 64)
    assert [len(pairs), sum(map(len, (group.pairs for group in grouped(pairs))))] == [len(records), len(rows)]


@pytest.mark.parametrize(("responses", "annotations"), [(2, 2), (8, 0)])
def test_annotations_that_cannot_be_are_refused(responses: int, annotations: int):
    with pytest.raises(ValueError, match=f"edit_annotations={annotations} with responses={responses}.*; allowed: 1"):
        Farm(responses=responses, edit_annotations=annotations)
    with pytest.raises(ValueError, match=r"^annotations=0 is not allowed; allowed: a number above 0"):
        Farm(annotations=0)


def test_the_kind_of_a_comparison_says_how_its_responses_differ():
    rows, kinds = FARM.load("preference_validation").to_list(), FARM.kinds()
    assert len(kinds) == len(rows)
    assert set(kinds) == {"writers", "writers_and_edits", *(edit.__name__ for edit in EDITS)}
    for row, kind in zip(rows, kinds, strict=True):
        shorter, longer = sorted((row["chosen"], row["rejected"]), key=len)
        if kind in ("restate_fact", "repeat_sentence", "loop", "add_fact"):
            assert longer.startswith(shorter)
        if kind == "change_subject":
            subject = FARM.tasks.by_instruction[row["prompt"].strip()].subject
            assert (subject.opening in shorter) != (subject.opening in longer)
