"""Factual precision by groups of prompts, as the farm's people by fame."""

import pytest

from rlhf.data.farm import Facts, Farm
from rlhf.data.records import Prompt
from rlhf.evaluation.evaluator import ResponseEvaluator, evaluation_metrics, precision_by_group


def test_precision_is_pooled_within_each_group() -> None:
    facts = [Facts(3, 3), Facts(1, 0), Facts(2, 1), Facts(0, 0), Facts(4, 4)]
    assert precision_by_group(["famous", "famous", "known", "obscure", ""], facts) == {
        "eval/factual_precision_famous": 0.75,
        "eval/factual_precision_known": 0.5,
        "eval/factual_precision_obscure": 0.0,
    }
    assert precision_by_group([], facts) == {}


def test_the_evaluation_tells_the_farms_precision_by_fame() -> None:
    farm = Farm(people=144, fame=1.0)
    people = [farm.world.people[0], farm.world.people[143]]
    prompts = [Prompt(f"Who is {person.name}?\n") for person in people]
    towns = people[0].truth["home"], next(town for town in farm.world.attribute(people[1], "home").values
                                          if town != people[1].truth["home"])  # fmt: skip
    answers = [f"{person.name} lives in {town}." for person, town in zip(people, towns, strict=True)]
    metrics, _ = ResponseEvaluator(farm, lambda *_: [])(prompts, answers)
    assert metrics["eval/factual_precision_famous"] == 1
    assert metrics["eval/factual_precision_obscure"] == 0
    assert metrics["eval/factual_precision"] == pytest.approx(0.5)
    assert "eval/factual_precision_known" not in metrics
    flat, _ = ResponseEvaluator(Farm(people=144), lambda *_: [])(prompts, answers)
    assert not [name for name in (*flat, *evaluation_metrics(Farm(people=144), False, False)) if "precision_" in name]
    assert "eval/factual_precision_obscure" in evaluation_metrics(farm, False, False)
