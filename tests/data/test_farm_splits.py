"""The farm's splits: who demonstrations are about, and which responses are compared."""

import math
import statistics
from collections import Counter

import pytest

from rlhf.data.farm import Farm
from rlhf.data.farm.dataset import GROUPS
from rlhf.data.farm.judge import analyze
from rlhf.data.farm.writers import EDITS
from rlhf.data.records import Split
from rlhf.errors import DataError

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


def test_several_annotators_compare_a_response_with_its_edit():
    """Each gives a row, with a label of their own; all other pairs have one, and the responses stay what they were."""
    rows = Farm(responses=8, comparisons=20 * 44, edit_annotations=5).load("preference").to_list()
    whole = [row for row in rows if row["prompt"] != rows[-1]["prompt"]]  # the last prompt's rows may be cut off
    pairs = Counter(frozenset((row["chosen"], row["rejected"])) for row in whole)
    often = [pair for pair, count in pairs.items() if count == 5]
    assert set(pairs.values()) == {1, 5}
    assert len(whole) // 44 * 3 <= len(often) <= 20 * 4  # at most four edits to a prompt; some change nothing
    labels = Counter((row["chosen"], row["rejected"]) for row in whole)
    assert any(labels[a, b] and labels[b, a] for a, b in map(tuple, often))  # annotators disagree


def test_several_annotators_compare_every_pair():
    once = Farm(comparisons=50).load("preference").to_list()
    rows = Farm(comparisons=3 * 50, annotations=3).load("preference").to_list()
    assert {row["prompt"] for row in rows} <= {row["prompt"] for row in once}  # fewer prompts, if any, for as many rows
    for start in range(0, len(rows), 3):
        assert len({frozenset((row["chosen"], row["rejected"])) for row in rows[start : start + 3]}) == 1
    assert len({(row["chosen"], row["rejected"]) for row in rows}) > 50  # annotators disagree
    grouped = Farm(responses=8, comparisons=20 * 72, annotations=2, edit_annotations=6).load("preference").to_list()
    whole = [row for row in grouped if row["prompt"] != grouped[-1]["prompt"]]  # the last prompt's rows may be cut off
    counts = Counter(frozenset((row["chosen"], row["rejected"])) for row in whole)
    assert set(counts.values()) == {2, 6}


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
