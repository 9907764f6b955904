"""FActScore: entities, atomic facts, abstentions, the length penalty, and a cache like that of the judges."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.records import Prompt
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, DataError, Interrupted
from rlhf.evaluation.evaluator import ResponseEvaluator
from rlhf.evaluation.fact_answers import read_facts, read_truth
from rlhf.evaluation.factscore import FactScore, length_penalty
from tests.helpers.entity_pages import PAGES
from tests.helpers.openai_server import Server, serving, text_of
from tests.helpers.scorer_context import NoSource

RESPONSES = [
    "Ada Lind was born in Oslo. Ada Lind was born in Rome and Ada Lind painted ships.",
    "Ben Ruiz is a chef.",
    "I'm sorry, but I do not have any information about Cy Okoro.",
    "What a fine day!",
]


@pytest.fixture
def entities(tmp_path: Path) -> Path:
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps({"entity": name, "text": page}) + "\n" for name, page in PAGES.items()))
    return path


def annotator(request: dict[str, Any], number: int = 0) -> str:
    """Split sentences at "and"; call a fact true if all its words except the subject are in the reference text."""
    asked = request["messages"][-1]["content"]
    if asked.startswith("The sentence"):
        sentence = asked.rpartition("Sentence: ")[2].rstrip(".")
        return "none" if "!" in sentence else "\n".join(f"- {part.strip()}." for part in sentence.split(" and "))
    reference, fact = re.findall(r":\n(.*)\n\nStatement: (.*?)\.\n", asked, re.DOTALL)[0]
    words = set(fact.split()[2:])
    return "True" if words <= set(re.findall(r"\w+", reference)) else "False."


def no_judge(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
    raise AssertionError


def make(server: Server, folder: Path, entities: Path, **keys: Any) -> FactScore:
    client = {"base_url": server.url, "api_key_env": None, "retries": 1, **keys.pop("client", {})}
    keys = {"abstention": [r"(?i)^\W*i'm sorry"], "sampling": {"temperature": 0.0}, **keys}
    return FactScore(folder, entities=str(entities), model="some", client=client, **keys)


def test_facts_are_split_checked_and_counted_with_and_without_the_penalty(tmp_path: Path, entities: Path) -> None:
    with serving(annotator) as server:
        scorer = make(server, tmp_path, entities)
        metrics, records = scorer(scorer.prompts(None), RESPONSES)
    assert [record["stated"] for record in records] == [3, 1, None, None]
    assert [record["supported"] for record in records] == [2, 1, None, None]
    assert [record["abstained"] for record in records] == [False, False, True, False]
    assert records[0]["facts"].splitlines() == [
        "+ Ada Lind was born in Oslo.", "- Ada Lind was born in Rome.", "+ Ada Lind painted ships."]  # fmt: skip
    assert metrics["eval/factual_precision"] == pytest.approx((2 / 3 + 1) / 2)
    penalised = (2 / 3 * math.exp(1 - 10 / 3) + math.exp(1 - 10 / 1)) / 2
    assert metrics["eval/factscore"] == pytest.approx(penalised)
    assert metrics["eval/facts_per_response"] == 2
    assert metrics["eval/responding_ratio"] == 0.5
    assert (
        metrics["judge/answers"] == len(server.requests) == 4 + 4
    )  # sentences and facts; nothing is asked about an abstention


def test_without_gamma_there_is_no_penalty() -> None:
    assert length_penalty(10, 10) == length_penalty(3, 0) == 1
    assert length_penalty(5, 10) == pytest.approx(math.exp(-1))


def test_each_fact_is_checked_against_the_page_of_its_own_entity(tmp_path: Path, entities: Path) -> None:
    with serving(annotator) as server:
        scorer = make(server, tmp_path, entities)
        scorer(scorer.prompts(None)[:2], RESPONSES[:2])
        checks = [text_of(request) for request in server.requests if "Statement: " in text_of(request)]
    assert len(checks) == 4
    for text in checks:
        own, other = ("Ada", "Lima") if "Statement: Ada" in text else ("Ben", "Oslo")
        assert f"Reference text about {own}" in text
        assert other not in text


def test_a_broken_off_evaluation_continues_from_the_cache(tmp_path: Path, entities: Path) -> None:
    broken = True

    def breaks(request: dict[str, Any], number: int) -> Any:
        return (500, {"error": {"message": "no"}}) if broken and number > 5 else annotator(request)

    with serving(breaks) as server:
        scorer = make(server, tmp_path, entities, client={"concurrency": 1})
        with pytest.raises(Interrupted, match="what was judged is kept"):
            scorer(scorer.prompts(None), RESPONSES)
        broken, before = False, len(server.requests)
        scorer = make(server, tmp_path, entities)
        metrics, _ = scorer(scorer.prompts(None), RESPONSES)
        assert len(server.requests) - before == 8 - 5
    assert metrics["judge/from_cache"] == 5
    assert metrics["eval/factual_precision"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_verdict_that_cannot_be_read_counts_neither_way(tmp_path: Path, entities: Path) -> None:
    def unsure(request: dict[str, Any], number: int) -> str:
        return "Perhaps." if "Statement: Ada Lind was born in Rome" in text_of(request) else annotator(request)

    with serving(unsure) as server:
        scorer = make(server, tmp_path, entities, attempts=2)
        metrics, records = ResponseEvaluator(NoSource(), no_judge, None, scorer)(scorer.prompts(None), RESPONSES)
    assert (records[0]["stated"], records[0]["supported"], records[0]["precision"]) == (3, 2, 1.0)
    assert metrics["judge/unparsable"] == 2
    assert metrics["judge/unjudged"] == 1
    assert records[0]["response"] == RESPONSES[0]


def test_if_no_fact_can_be_found_nothing_is_reported(tmp_path: Path, entities: Path) -> None:
    with serving(lambda request, number: "Well …") as server:
        scorer = make(server, tmp_path, entities)
        with pytest.raises(ConfigError, match="not one fact of 4 responses"):
            scorer(scorer.prompts(None), RESPONSES)
        metrics, _ = scorer(scorer.prompts(None)[2:3], RESPONSES[2:3])
    assert metrics["eval/responding_ratio"] == 0
    assert "eval/factual_precision" not in metrics


def test_prompts_name_the_entities_in_the_template_of_the_data(tmp_path: Path, entities: Path) -> None:
    with serving(annotator) as server:
        scorer = make(server, tmp_path, entities, prompt="Who is {entity}?")
    template = Template("{instruction} {input}", "### {instruction}\n")
    assert scorer.prompts(template)[0].prompt == "### Who is Ada Lind?\n"
    assert scorer.prompts(None)[1].instruction == "Who is Ben Ruiz?"


@pytest.mark.parametrize(
    ("answer", "facts"),
    [
        ("- A is b.\n- C is d.", ["A is b.", "C is d."]),
        ("Here they are:\n1. A is b.\n2) C is d.\n", ["A is b.", "C is d."]),
        ("* A is b.", ["A is b."]),
        ("None.", []),
        # a statement that there are no facts, and facts that begin like one
        ("None", []),
        ("- None", []),
        ("- none.", []),
        ("No facts", []),
        ("No facts.", []),
        ("- No facts", []),
        ("* N/A", []),
        ("There are no facts in this sentence.", []),
        ("The sentence states no verifiable facts.", []),
        ("1. None of his brothers survived.", ["None of his brothers survived."]),
        ("- No information about her was published in 1990.", ["No information about her was published in 1990."]),
        ("- A is B.\n- None", ["A is B."]),
        ("– A is B.", ["A is B."]),
        ("- Nothing", []),
        ("- Nothing Compares is a song.", ["Nothing Compares is a song."]),
        ("**None**", []),
        ("None.\n", []),
        ("A is b.", None),
        ("", None),
    ],
)
def test_lists_of_facts_are_read(answer: str, facts: list[str] | None) -> None:
    assert read_facts(answer) == facts


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("True", True),
        ("false.", False),
        ("**True**, since it says so", True),
        ("True or False?", None),
        ("False.", False),
        ("This is not true.", False),
        ("Not true", False),
        ("It isn't true.", False),
        ("It isn’t true.", False),
        ("That cannot be verified as true", False),
        ("It is not false", None),
        ("The answer is: False. It is not true.", False),
        ("untrue", False),
        ("The answer is True.", True),
        ("Answer: **False**", False),
        ("[True]", True),
        ("True. The text does not say otherwise.", True),
        ("True, it does not contradict the text.", True),
        ("False, it isn't true.", False),
        ("False, because that is not true of her", False),
        ("Partially true", None),
        ("It may be true", None),
        ("It is not known whether this is true.", None),
        ("The statement is true.", True),
        ("Nothing in the text says otherwise, so it is true.", None),
        ("It is, strictly speaking, not true", False),
        ("It is not, strictly speaking, true", False),
        ("There is no evidence that it is true.", False),
        ("True. No, wait: false.", None),
        ("True is not the answer", False),
        ("The statement is neither true nor false", None),
        ("I can't say if it's true or false.", None),
        ("False; the text says 1901, not 1902.", False),
        ("The statement is false because it says she was not born there", False),
        ("TRUE", True),
        ("Truely", None),
        ("", None),
        ("It would be true if she were older.", None),
        ("The reference states it. True", True),
        ("Statement: It is true that cats fly.\nFalse", None),
        ("It's far from true", False),
        ("**False.** She was not a painter.", False),
        ("It is true that she was not a painter.", False),
        ("True - she did not paint.", True),
    ],
)
def test_verdicts_are_read(answer: str, truth: bool | None) -> None:
    assert read_truth(answer) is truth


def test_mistakes_are_found_early(tmp_path: Path, entities: Path) -> None:
    good = {"entities": str(entities), "model": "m", "client": {"api_key_env": None}}
    FactScore.check({"_target_": "x", **good})
    (tmp_path / "bare.txt").write_text("Ada Lind\n")
    (tmp_path / "broken.jsonl").write_text('{"entity": "A"}\n{')
    (tmp_path / "empty.jsonl").write_text("")
    for keys, sentence in [
        ({"entities": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"entities": str(tmp_path / "bare.txt")}, "the file of entities has no page for 1 of 1"),
        ({"entities": str(tmp_path / "broken.jsonl")}, "broken.jsonl, line 2: not JSON"),
        ({"entities": str(tmp_path / "empty.jsonl")}, "names no entity"),
        ({"model": ""}, "evaluation.factscore.model has no value"),
        ({"prompt": "Tell me."}, "must contain {entity}"),
        ({"abstention": ["("]}, "is not a regular expression"),
        (
            {"split_prompt": "compare"},
            "evaluation.factscore.split_prompt=compare must use exactly {entity}, {sentence}",
        ),
        ({"gamma": -1.0}, "evaluation.factscore.gamma=-1.0"),
        ({"client": {"api_key_env": "NO_SUCH_KEY_HERE"}}, r"\$NO_SUCH_KEY_HERE is not set"),
    ]:
        with pytest.raises((ConfigError, DataError), match=sentence):
            FactScore.check({**good, **keys})
