"""The length-controlled win rate, on simulated judges whose preferences are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from rlhf.data.records import Prompt
from rlhf.errors import DataError
from rlhf.evaluation.difficulty import fit_difficulties, load_difficulties
from rlhf.evaluation.evaluator import ResponseEvaluator, win_rates
from rlhf.evaluation.length_control import Rate, length_adjusted_win_rate, length_controlled_win_rate


def lengths(seed: int, number: int, longer: float, spread: float = 100.0) -> tuple[list[int], list[int]]:
    """The run's answers are `longer` characters longer than the reference's on average."""
    rng = np.random.default_rng(seed)
    theirs = rng.integers(400, 900, number)
    return (theirs + rng.normal(longer, spread, number)).round().astype(int).tolist(), theirs.tolist()


@pytest.mark.parametrize("longer", [-80.0, 0.0, 80.0])
def test_a_judge_that_only_prefers_length_gives_one_half(longer: float) -> None:
    raws, controlled = [], []
    for seed in range(
        20
    ):  # where only the sign of the difference counts, one set of 800 has a standard deviation of 0.05
        ours, theirs = lengths(seed, 800, longer)
        outcomes = [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
        raws.append(sum(outcomes) / len(outcomes))
        controlled.append(length_adjusted_win_rate(outcomes, ours, theirs).value)
    assert abs(np.mean(raws) - 0.5) > 0.2 or longer == 0
    assert np.mean(controlled) == pytest.approx(0.5, abs=0.04)
    assert np.std(controlled) < 0.08


def test_a_judge_swayed_by_length_at_random_gives_one_half() -> None:
    ours, theirs = lengths(1, 4000, 80.0)
    difference = np.subtract(ours, theirs)
    chance = 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std(ddof=1))))
    outcomes = (np.random.default_rng(2).random(4000) < chance).astype(float).tolist()
    assert sum(outcomes) / 4000 > 0.65
    assert length_adjusted_win_rate(outcomes, ours, theirs).value == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("quality", [0.2, 0.5, 0.9])
def test_a_judge_that_ignores_length_gives_the_raw_win_rate(quality: float) -> None:
    ours, theirs = lengths(3, 4000, 60.0)
    outcomes = (np.random.default_rng(4).random(4000) < quality).astype(float).tolist()
    raw = sum(outcomes) / 4000
    assert length_adjusted_win_rate(outcomes, ours, theirs).value == pytest.approx(raw, abs=0.015)


def test_a_judge_of_both_gives_the_win_rate_at_equal_length() -> None:
    ours, theirs = lengths(5, 8000, 100.0)
    scaled = np.tanh(np.subtract(ours, theirs) / np.subtract(ours, theirs).std(ddof=1))
    chance = 1 / (1 + np.exp(-(-0.8 + 1.5 * scaled)))
    outcomes = (np.random.default_rng(6).random(8000) < chance).astype(float).tolist()
    expected = 1 / (1 + np.exp(0.8))
    assert sum(outcomes) / 8000 > expected + 0.1
    assert length_adjusted_win_rate(outcomes, ours, theirs).value == pytest.approx(expected, abs=0.02)


def test_equal_lengths_leave_the_win_rate_as_it_is_and_draws_are_halves() -> None:
    outcomes = [1.0, 0.5, 0.5, 0.0, 1.0, 1.0, 0.5, 1.0] * 50
    raw = sum(outcomes) / len(outcomes)
    assert length_adjusted_win_rate(outcomes, [7] * 400, [7] * 400).value == pytest.approx(raw, abs=1e-4)


def test_the_fit_is_the_minimum_by_brute_force() -> None:
    ours, theirs = lengths(7, 60, 30.0)
    outcomes = np.random.default_rng(8).choice([0.0, 0.5, 1.0], 60)
    difference = np.subtract(ours, theirs).astype(float)
    feature = np.tanh(difference / difference.std(ddof=1))
    a, b = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-2, 2, 101), indexing="ij")
    logits = a[..., None] + b[..., None] * feature
    loss = (np.logaddexp(0, logits) - outcomes * logits).sum(-1) + 0.005 * (a**2 + b**2)
    best = a[np.unravel_index(loss.argmin(), loss.shape)]
    found = length_adjusted_win_rate(outcomes.tolist(), ours, theirs).value
    assert found == pytest.approx(1 / (1 + np.exp(-best)), abs=0.003)


def test_one_sided_outcomes_stay_finite_and_one_pair_is_enough() -> None:
    assert 0.99 < length_adjusted_win_rate([1.0] * 50, [5] * 50, list(range(50))).value < 1
    assert length_adjusted_win_rate([1.0] * 300, [5] * 300, [5] * 300).value > 0.999
    assert 0.5 < length_adjusted_win_rate([1.0], [5], [4]).value < 1
    with pytest.raises(ValueError, match="no outcomes"):
        length_adjusted_win_rate([], [], [])


class Longer:
    """A judge that prefers the longer answer, and a data set that must not be read."""

    splits = ()

    def load(self, split: str) -> None:
        raise AssertionError

    def __call__(self, prompts: list[Prompt], responses: list[str]) -> list[float | None]:
        return [float(len(r) > len(row.reference_output)) for row, r in zip(prompts, responses, strict=True)]


def test_any_judge_gets_it_and_unjudged_pairs_do_not_count() -> None:
    ours, theirs = lengths(9, 500, 70.0)
    prompts = [Prompt(f"{i}", "x" * n) for i, n in enumerate(theirs)]
    responses = ["y" * n for n in ours]
    metrics, _ = ResponseEvaluator(Longer(), Longer())(prompts, responses)  # type: ignore[arg-type]
    assert metrics["eval/win_rate"] > 0.7
    assert metrics["eval/length_adjusted_win_rate"] == pytest.approx(0.5, abs=0.07)
    outcomes = Longer()(prompts, responses)
    assert win_rates(prompts[:400], responses[:400], [*outcomes[:300], *[None] * 100]) == win_rates(
        prompts[:300], responses[:300], outcomes[:300]
    )


# -- standard errors, and the difficulty of instructions ---------------------------------------------------------------


def world(rng: np.random.Generator, number: int, strength: float, slope: float, hard: np.ndarray) -> tuple:
    """Outcomes of a judge whose logit is strength + slope · tanh(Δ / sd Δ) + difficulty of the instruction."""
    theirs = rng.integers(400, 900, number)
    ours = (theirs + rng.normal(60, 100, number)).round().astype(int)
    scaled = np.tanh((ours - theirs) / (ours - theirs).std(ddof=1))
    wins = (rng.random(number) < expit(strength + slope * scaled + hard)).astype(float)
    return wins.tolist(), ours.tolist(), theirs.tolist()


@pytest.mark.parametrize(("slope", "spread"), [(0.0, 0.0), (1.5, 0.0), (1.5, 2.0)])
def test_the_standard_error_is_the_scatter_over_judged_sets(slope: float, spread: float) -> None:
    rng, found = np.random.default_rng(0), list[tuple[Rate, Rate, float]]()
    for _ in range(300):
        hard = rng.normal(0, spread, 300)
        drawn = world(rng, 300, -0.3, slope, hard)
        full = length_controlled_win_rate(*drawn, hard.tolist())
        found.append((length_adjusted_win_rate(*drawn), full, float(np.mean(drawn[0]))))
    for rates in ([row[0] for row in found], [row[1] for row in found]):
        values, errors = np.array([rate.value for rate in rates]), np.array([rate.error for rate in rates])
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.1)
        assert 0.92 <= np.mean(abs(values - values.mean()) <= 1.96 * errors) <= 0.98
    if slope:  # the standard error of the raw win rate would be wrong
        assert np.std([row[0].value for row in found]) > 1.15 * np.std([row[2] for row in found])


def test_one_pair_and_no_pair_have_no_standard_error() -> None:
    prompts = [Prompt("a", "xx"), Prompt("b", "xxx")]
    one = win_rates(prompts, ["y", "yy"], [1.0, None])
    assert one["eval/win_rate"] == 1
    assert math.isnan(one["eval/win_rate_se"])
    assert math.isnan(one["eval/length_adjusted_win_rate_se"])
    assert all(map(math.isnan, win_rates(prompts, ["y", "yy"], [None, None], {"a": 0.0, "b": 1.0}).values()))


def test_difficulties_are_found_from_several_models_and_control_what_one_run_cannot() -> None:
    """Answers are longer where wins are easy: estimated from the run alone, difficulty is mistaken for length."""
    rng, number = np.random.default_rng(1), 600
    hard = rng.normal(0, 1.5, number)
    theirs = rng.integers(400, 900, number)
    annotations = {}
    for model in range(25):
        ours = (theirs + rng.normal(30, 100, number) + 60 * hard).round().astype(int)
        scaled = np.tanh((ours - theirs) / (ours - theirs).std(ddof=1))
        wins = rng.random(number) < expit(rng.normal() + rng.normal(1, 0.3) * scaled + hard)
        columns = zip(map(str, range(number)), wins.astype(float).tolist(), ours.tolist(), theirs.tolist(), strict=True)
        annotations[f"m{model}"] = list(columns)
    known = fit_difficulties(annotations)
    found = np.array([known[str(i)] for i in range(number)])
    assert np.corrcoef(found, hard)[0, 1] > 0.9
    far, near = [], []
    for _ in range(20):
        ours = (theirs + rng.normal(-30, 60, number) + 60 * hard).round().astype(int)
        wins = (rng.random(number) < expit(-0.5 + hard)).astype(float).tolist()  # this judge ignores length
        truth = float(expit(-0.5 + hard).mean())
        far.append(length_adjusted_win_rate(wins, ours.tolist(), theirs.tolist()).value - truth)
        near.append(length_controlled_win_rate(wins, ours.tolist(), theirs.tolist(), found.tolist()).value - truth)
    assert abs(np.mean(near)) < 0.02
    assert abs(np.mean(far)) > 2 * abs(np.mean(near))


def test_difficulties_are_read_by_instruction_or_in_order(tmp_path: Path) -> None:
    named, ordered = tmp_path / "named.jsonl", tmp_path / "ordered.csv"
    named.write_text('{"instruction": "b", "difficulty": 2}\n{"instruction": "a ", "difficulty": 1.5}\n')
    ordered.write_text("index,instruction_difficulty\n0,0.5\n1,-1\n")
    assert load_difficulties(str(named), ["a", "b"]) == {"a": 1.5, "b": 2.0}
    assert load_difficulties(str(ordered), ["a", "b"]) == {"a": 0.5, "b": -1.0}
    assert load_difficulties(str(named), ["a", "c"], used=1) == {"a": 1.5}
    with pytest.raises(DataError, match="lacks 1 of the 2 evaluation instructions; the first is 'c'"):
        load_difficulties(str(named), ["a", "c"])
    with pytest.raises(DataError, match="2 difficulties and no instructions"):
        load_difficulties(str(ordered), ["a", "b", "c"])
    ordered.write_text("index,instruction_difficulty\n0,0.5\n1,hard\n")
    with pytest.raises(DataError, match=r"ordered.csv, row 2: instruction_difficulty is 'hard', not a number"):
        load_difficulties(str(ordered), ["a", "b"])


def test_difficulties_are_fitted_from_a_folder_of_annotations(tmp_path: Path) -> None:
    for model, wins in (
        ("m", {"easy": 2, "hard": 1}),
        ("n", {"easy": 1.9, "hard": 1.1}),
        ("o", {"easy": 2, "hard": None}),
    ):
        rows = [
            {"instruction": text, "output_1": "x", "output_2": "yy", "generator_2": model, "preference": preference}
            for text, preference in wins.items()
        ]
        (tmp_path / model).mkdir()
        (tmp_path / model / "annotations.json").write_text(json.dumps(rows))
    found = load_difficulties(str(tmp_path), ["easy", "hard"])
    assert found["easy"] > found["hard"]
    with pytest.raises(DataError, match="those of several are needed"):
        load_difficulties(str(tmp_path / "m" / "annotations.json"), ["easy"])
    (tmp_path / "m" / "annotations.json").write_text('[{"instruction": "easy"}]')
    with pytest.raises(DataError, match="row 1: it has no output_1"):
        load_difficulties(str(tmp_path), ["easy"])


def test_the_length_controlled_rate_is_there_where_difficulties_are_known() -> None:
    rng = np.random.default_rng(3)
    prompts = [Prompt(f"{i}", "x" * int(n)) for i, n in enumerate(rng.integers(10, 90, 80))]
    responses = ["y" * int(n) for n in rng.integers(10, 90, 80)]
    metrics, _ = ResponseEvaluator(Longer(), Longer())(prompts, responses)  # type: ignore[arg-type]
    assert "eval/length_controlled_win_rate" not in metrics
    known = {row.prompt: float(rng.normal()) for row in prompts}
    metrics, _ = ResponseEvaluator(Longer(), Longer(), difficulty=known)(prompts, responses)  # type: ignore[arg-type]
    assert 0 <= metrics["eval/length_controlled_win_rate"] <= 1
    assert metrics["eval/length_controlled_win_rate_se"] > 0
