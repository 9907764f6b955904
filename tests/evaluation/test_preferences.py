"""Simulated preferences: which prompts are used, what a verdict becomes, and what survives an interruption."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf

from rlhf import root
from rlhf.data.records import Prompt, SampledComparison, as_records
from rlhf.data.saved_preferences import PREFERENCE_SPLITS, SavedPreferences
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, DataError, Interrupted
from rlhf.evaluation import preferences
from rlhf.evaluation.labelled_pairs import count_labels
from rlhf.evaluation.llm_pool import LLMPool
from rlhf.evaluation.preferences import Simulated
from rlhf.evaluation.prompts import strip_template
from rlhf.files import read_lines
from rlhf.finished.chat.models import ModelCache, score
from rlhf.finished.judge import FinishedRewardModelJudge
from rlhf.finished.run import FinishedRun
from tests.helpers.finished_runs import finished_outputs
from tests.helpers.openai_server import serving, text_of
from tests.helpers.scorer_context import scorer_context
from tests.helpers.tiny_models import word_tokenizer

GOLD = {"_target_": "rlhf.evaluation.judges.GoldJudge"}


def simulated(**keys: Any) -> Simulated:
    return Simulated(judge=GOLD, **{"validation_pairs": 2, "max_new_tokens": 8, **keys})


class Words:
    """A data set that has prompts only."""

    def __init__(self, **prompts: list[str]):
        self.prompts, self.splits = prompts, tuple(prompts)

    def load(self, split: str) -> Dataset:
        return Dataset.from_dict({"prompt": self.prompts[split]})


# -- which prompts are used --------------------------------------------------------------------------------------------


def texts(rows: Sequence[Prompt]) -> list[str]:
    return [row.prompt for row in rows]


def test_the_prompts_are_the_splits_own_in_an_order_that_the_seed_decides() -> None:
    source = Words(preference=list("abbbacdefgh"), preference_validation=list("xyz"))
    asked = simulated().draw_prompts(source, None)  # the comparisons of one prompt, in consecutive rows, ask it once
    assert sorted(texts(asked["preference"])) == list("aabcdefgh")
    assert set(texts(asked["preference_validation"])) < set("xyz")
    assert asked == simulated().draw_prompts(source, None)
    assert asked != simulated(seed=1).draw_prompts(source, None)


def test_beyond_its_end_a_split_begins_again() -> None:
    source = Words(preference=list("abc"), preference_validation=list("xyz"))
    asked = texts(simulated(pairs=7).draw_prompts(source, None)["preference"])
    assert asked[3:6] == asked[:3]
    assert Counter(asked).most_common()[0] == (asked[0], 3)
    assert texts(simulated(pairs=2).draw_prompts(source, None)["preference"]) == asked[:2]


def test_a_prompt_that_is_held_out_is_in_no_pair_for_training() -> None:
    asked = simulated(split="prompts").draw_prompts(Words(prompts=list("aaaabbbbccccdd")), None)
    train, held_out = (texts(asked[split]) for split in PREFERENCE_SPLITS)
    assert len(held_out) == len(set(held_out)) == 2
    assert set(train) == set("abcd") - set(held_out)
    with pytest.raises(DataError, match=r"has 2 different prompts, too few to hold out preferences.validation_pairs=2"):
        simulated(split="prompts").draw_prompts(Words(prompts=["a", "b", "b"]), None)


@pytest.mark.parametrize("name", ["alpaca", "question_answer", "short"])
def test_judges_read_the_instruction_without_its_template(name: str) -> None:
    template = Template(**OmegaConf.load(root() / "conf/data/template" / f"{name}.yaml"))
    for instruction, more in (("Add {1} and 2.\n\nThen (stop)?", ""), ("Sort.", "b\n\n### Response:\na")):
        prompt = template.render(instruction, more)
        assert strip_template(prompt, template) == (f"{instruction}\n\n{more}" if more else instruction)
    assert strip_template("Introduce Mira.\n", template) == "Introduce Mira.\n"
    source = Words(preference=[template.render("Go!")], preference_validation=[template.render("Stop!")])
    assert simulated().draw_prompts(source, template)["preference"][0].instruction == "Go!"


# -- from verdicts to labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "first", "preferred", "dropped"),
    [
        (1.0, "a", "first", None),
        (0.0, "a", "second", None),
        (0.75, "a", "first", None),  # three of four annotators
        (0.5, "a", None, "tie"),
        (None, "a", None, "unjudged"),
        (1.0, "b", None, "identical"),
    ],
)
def test_a_verdict_is_a_label_or_a_reason(outcome: Any, first: str, preferred: Any, dropped: Any) -> None:
    row = simulated().label("preference/0", "Q", first, "b", outcome, 0.0)
    assert (row.preferred, row.dropped, row.flipped) == (preferred, dropped, False)
    if dropped is None:
        chosen = "a" if preferred == "first" else "b"
        assert (row.comparison.chosen, row.comparison.rejected) == (chosen, "b" if chosen == "a" else "a")
        turned = simulated().label("preference/0", "Q", first, "b", outcome, 1.0)
        assert turned.flipped
        assert (turned.comparison.chosen, turned.comparison.rejected) == (row.comparison.rejected, chosen)


def test_flips_are_a_share_of_the_labels_the_same_for_a_seed_and_counted() -> None:
    def labels(seed: int, rows: int = 4000) -> list[bool]:
        making = simulated(seed=seed)
        return [making.label(f"preference/{i}", "Q", "a", "b", 1.0, 0.25).flipped for i in range(rows)]

    flipped = labels(0)
    assert abs(sum(flipped) / 4000 - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 4000)
    assert flipped[:100] == labels(0, 100)
    assert flipped != labels(1)
    making = simulated()
    rows = [making.label(f"preference/{i}", "Q", "a", "b", 1.0, 0.25) for i in range(4000)]
    assert count_labels(rows)["flipped"] == sum(flipped) == sum(row.comparison.chosen == "b" for row in rows)


def test_a_coin_decides_ties_if_so_wanted() -> None:
    making = simulated(ties="random")
    rows = [making.label(f"preference/{i}", "Q", "a", "b", 0.5, 0.0) for i in range(1000)]
    heads = sum(row.preferred == "first" for row in rows)
    assert abs(heads - 500) < 3 * math.sqrt(250)
    assert count_labels(rows) == {
        "pairs": 1000, "identical": 0, "unjudged": 0, "ties": 1000, "flipped": 0, "comparisons": 1000
    }  # fmt: skip


# -- sampling and judging ----------------------------------------------------------------------------------------------


class Scripted:
    """A model with scripted answers and a judge that prefers longer ones, cannot judge `?`, and fails if `broken`."""

    def __init__(self, broken: bool = False):
        self.parts: list[int] = []
        self.broken, self.report = broken, {"judge/cost": 0.5}

    def answer(self, prompts: list[str], part: int) -> Any:
        self.parts.append(part)
        script = {"long": ("x", "xxx"), "same": ("x", "x"), "tie": ("x", "y"), "odd": ("?", "x")}
        said = [script[prompt.split()[0]][place % 2] for place, prompt in enumerate(prompts)]
        return SimpleNamespace(responses=said, ended=torch.tensor([text != "xxx" for text in said]))

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        if self.broken:
            raise Interrupted("the endpoint is out")
        assert all(row.reference_output != response for row, response in zip(prompts, responses, strict=True))
        pairs = [(response, row.reference_output) for row, response in zip(prompts, responses, strict=True)]
        return [None if "?" in a + b else (1 + (len(a) > len(b)) - (len(a) < len(b))) / 2 for a, b in pairs]


ASKED = {
    "preference": [Prompt(f"{word} {i}") for i, word in enumerate(["long", "same", "tie", "odd", "long", "long"])],
    "preference_validation": [Prompt("long 6"), Prompt("tie 7")],
}


def test_samples_are_kept_when_the_judge_breaks_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "PAIRS_PER_PART", 3)
    making, first = simulated(flip=1.0), Scripted(broken=True)
    with pytest.raises(Interrupted):
        making.make(tmp_path, ASKED, first.answer, lambda: first)
    assert first.parts == [0, 1, 2]
    (tmp_path / "samples" / "00000003.json").unlink()  # as after a kill in the middle
    second = Scripted()
    found = making.make(tmp_path, ASKED, second.answer, lambda: second)
    assert second.parts == [1]
    assert found == {
        "preferences/pairs": 6, "preferences/identical": 1, "preferences/unjudged": 1, "preferences/ties": 1,
        "preferences/flipped": 3, "preferences/comparisons": 3, "preferences/validation_comparisons": 1,
        "preferences/cut": 4 / 16, "judge/cost": 0.5,
    }  # fmt: skip
    saved = SavedPreferences(tmp_path)
    assert saved.load("preference").to_list() == [
        {"prompt": f"long {i}", "chosen": "x", "rejected": "xxx", "chosen_ended": True, "rejected_ended": False}
        for i in (0, 4, 5)
    ]
    held_out = {"prompt": "long 6", "chosen": "xxx", "rejected": "x", "chosen_ended": False, "rejected_ended": True}
    assert saved.load("preference_validation").to_list() == [held_out]
    assert as_records(saved.load("preference_validation"), "preference_validation") == [SampledComparison(**held_out)]
    rows = read_lines(tmp_path / "preference_pairs.jsonl")
    assert [row["dropped"] for row in rows] == [None, "identical", "tie", "unjudged", None, None]
    assert [row["outcome"] for row in rows] == [0.0, None, 0.5, None, 0.0, 0.0]


def test_preferences_without_any_comparison_are_an_error(tmp_path: Path) -> None:
    script = Scripted()
    asked = {**ASKED, "preference_validation": [Prompt("same 0")]}
    with pytest.raises(DataError, match="preference_validation: none of the simulated preferences can be used"):
        simulated().make(tmp_path, asked, script.answer, lambda: script)


def test_a_pool_reads_bare_instructions_and_its_keys_are_named_in_full(tmp_path: Path) -> None:
    asked = {split: [Prompt(row.prompt, instruction=f"Do {row.prompt}!") for row in ASKED[split]] for split in ASKED}

    def make(folder: Path, answer: Callable[[dict[str, Any], int], str]) -> tuple[dict[str, float], list[str]]:
        folder.mkdir()
        with serving(answer) as server:
            client = {"base_url": server.url, "api_key_env": None}
            keys = {"model": "some", "client": client, "pool": {"one": {"prompt": "compare"}}, "attempts": 1}
            found = simulated().make(folder, asked, Scripted().answer, lambda: LLMPool(scorer_context(folder), **keys))
            return found, [text_of(request) for request in server.requests]

    def likes_y(request: dict[str, Any], number: int) -> str:
        places = [place for place in "12" if f"Answer {place}:\ny" in text_of(request)]
        return f"Verdict: {places[0]}" if places else "no idea"

    found, requests = make(tmp_path / "a", likes_y)
    assert len(requests) == 7  # the judge is not asked about the identical pair
    assert all("Do " in request for request in requests)
    assert found["preferences/comparisons"] == found["preferences/validation_comparisons"] == 1
    assert found["preferences/unjudged"] == 4
    assert (found["judge/answers"], found["judge/unparsable"]) == (7, 5)
    with pytest.raises(ConfigError, match=r"^preferences\.judge\.answer=.* the prompts, preferences\.judge\.sampling"):
        make(tmp_path / "b", lambda request, number: "no idea")


def test_a_finished_reward_model_decides_as_it_scores(tmp_path: Path) -> None:
    runs = finished_outputs(tmp_path)
    judge = FinishedRewardModelJudge(scorer_context(tmp_path), str(runs.reward))
    part, tokenizer = ModelCache().reward(FinishedRun.open(runs.reward)), word_tokenizer()

    def scored(prompt: str, response: str) -> float:
        prompt_ids, ids = (tokenizer(text)["input_ids"] for text in (prompt, response))
        return score(part, prompt_ids, [*ids, tokenizer.eos_token_id])

    asked = [Prompt(f"w5 w{7 + i} w6", f"w{11 + i} w{40 - i}") for i in range(12)]
    responses = [f"w{20 + i}" for i in range(12)]
    expected = [
        float(scored(row.prompt, response) > scored(row.prompt, row.reference_output))
        for row, response in zip(asked, responses, strict=True)
    ]
    assert judge(asked, responses) == expected
    assert set(expected) == {0.0, 1.0}
    with pytest.raises(ConfigError, match=r"^judge\.folder=.*sft-0 is of stage=sft; allowed: stage=reward"):
        FinishedRewardModelJudge.check({"folder": str(runs.sft)})
    shutil.rmtree(runs.sft)
    with pytest.raises(ConfigError, match=r"was trained on sft-0, which is not in the cache"):
        FinishedRewardModelJudge.check({"folder": str(runs.reward)})
