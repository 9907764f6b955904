"""The farm: true utility against its judge, determinism, texts through the tokenizer, ranking of its writers."""

import functools
import hashlib
import inspect
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.farm import Facts, Farm
from rlhf.data.farm.writers import CAREFUL, EDITS, ORACLE, Writer, falsify_fact, write_response
from rlhf.data.records import SPLITS, DataSource, Split, columns
from rlhf.errors import DataError

FARM = Farm()
TOKENIZER = FARM.tokenizer()
VOCABULARY = sorted(TOKENIZER.get_vocab())
EVAL = FARM.load("eval").to_list()
MIRA = FARM.world.people[0]
BIO = f"Tell me a bio of {MIRA.name}."


@functools.cache
def rows_of(split: Split) -> list[dict[str, str]]:
    """The rows of a split, generated once."""
    return FARM.load(split).to_list()


def digest(farm: Farm) -> str:
    """A digest of all rows of a farm."""
    text = repr([farm.load(split).to_dict() for split in farm.splits]) + repr(sorted(farm.tokenizer().get_vocab()))
    return hashlib.sha256(text.encode()).hexdigest()


def answer(prompt: str, writer: Writer, seed: int = 0) -> str:
    return write_response(FARM.world, FARM.tasks.by_instruction[prompt.strip()], writer, Random(f"{seed}/{prompt}"))


def true_sentences() -> list[str]:
    """One sentence for each attribute of the first person in the farm."""
    clauses = [attribute.clauses(MIRA.truth[attribute.name])[0] for attribute in FARM.world.attributes["person"]]
    return [f"{MIRA.opening if place == 0 else MIRA.continuation} {clause}." for place, clause in enumerate(clauses)]


def win_rate(writer: Writer) -> float:
    wins = []
    for seed in range(3):
        for row in EVAL:
            ours = FARM.utility(row["prompt"], answer(row["prompt"], writer, seed))
            theirs = FARM.utility(row["prompt"], row["reference_output"])
            wins.append((ours > theirs) + 0.5 * (ours == theirs))
    return statistics.mean(wins)


def test_farm_is_a_data_source_with_the_columns_of_the_records():
    assert isinstance(FARM, DataSource)
    assert FARM.splits == SPLITS
    for split in SPLITS:
        assert len(rows_of(split)) == FARM.sizes[split]
        assert all(list(row) == columns(split) for row in rows_of(split))
        assert all(isinstance(value, str) for row in rows_of(split) for value in row.values())


def test_bad_requests_are_explained():
    with pytest.raises(DataError, match="no split 'test'"):
        inspect.unwrap(Farm.load)(FARM, "test")  # bypass the run-time type checker
    with pytest.raises(DataError, match="empty"):
        Farm(people=4, prompts=0).load("prompts")
    with pytest.raises(DataError, match="different prompts"):
        Farm(people=4).load("eval")
    with pytest.raises(DataError, match="no task with this prompt"):
        FARM.utility("What is the time?", "Noon.")
    with pytest.raises(ValueError, match="people"):
        Farm(people=1)
    with pytest.raises(ValueError, match="responses"):
        Farm(responses=1)
    with pytest.raises(ValueError, match="fame"):
        Farm(fame=-0.5)


@pytest.mark.parametrize("row", EVAL[:60], ids=lambda row: row["instruction"])
def test_the_oracle_is_right(row):
    response = answer(row["prompt"], ORACLE)
    stated, true = FARM.facts(row["prompt"], response)
    assert stated == true == FARM.tasks.by_instruction[row["instruction"]].count
    assert FARM.utility(row["prompt"], response) > 1


def test_prompt_and_instruction_are_judged_alike():
    for row in EVAL:
        assert FARM.utility(row["prompt"], "She.") == FARM.utility(row["instruction"], "She.")
        assert FARM.reference(row["instruction"]) == row["reference_output"]


def test_coverage_has_diminishing_but_positive_returns():
    sentences = true_sentences()
    utilities = [FARM.utility(BIO, " ".join(sentences[:count])) for count in range(1, 9)]
    gains = [after - before for before, after in itertools.pairwise(utilities)]
    assert min(gains) > 0
    assert gains[0] > 2 * gains[-1]
    assert FARM.facts(BIO, " ".join(sentences)) == Facts(8, 8)


def test_the_best_length_is_moderate():
    enough = FARM.utility(BIO, answer(BIO + "\n", ORACLE))
    endless = " ".join(true_sentences() * 2)
    assert enough > FARM.utility(BIO, endless)
    assert len(TOKENIZER.encode(answer(BIO + "\n", ORACLE))) < FARM.max_response_tokens


def test_more_facts_than_asked_for_do_not_pay():
    two = f"List two facts about {MIRA.name}."
    utilities = [FARM.utility(two, " ".join(true_sentences()[:count])) for count in range(1, 5)]
    assert max(utilities) == utilities[1]


def test_each_fault_costs():
    text = " ".join(true_sentences()[:4])
    good = FARM.utility(BIO, text)
    task = FARM.tasks.by_instruction[BIO]
    lie = falsify_fact(FARM.world, task, text, Random(0))
    assert FARM.facts(BIO, lie) == Facts(4, 3)
    other = FARM.world.people[2]
    faults = {
        "false": lie,
        "repeated": f"{text} {true_sentences()[3]}",
        "off topic": text.replace(MIRA.name, other.name),
        "cut": text[: text.rindex(" ")],
        "no full stop": text[:-1],
        "stray": f"{text} {other.name} keeps goats.",
        "stutter": text.replace(" was ", " was was "),
        "wrong pronoun": text.replace(MIRA.continuation, "He" if MIRA.continuation == "She" else "She", 1),
        "empty": "",
        "dot": ".",
    }
    assert {name for name, fault in faults.items() if FARM.utility(BIO, fault) >= good} == set()
    assert FARM.facts(BIO, faults["off topic"]) == Facts(0, 0)


def test_a_fact_is_counted_once_however_it_is_put():
    attribute = FARM.world.attribute(MIRA, "animal")
    first, second = attribute.clauses(MIRA.truth["animal"])
    assert FARM.facts(BIO, f"{MIRA.name} {first}. {MIRA.continuation} {second}.") == Facts(1, 1)


def test_a_farm_is_the_same_in_this_process_and_in_another():
    settings = {"people": 12, "demonstrations": 50, "comparisons": 50, "prompts": 20, "eval_prompts": 20}
    backwards = Farm(**settings)
    for split in reversed(SPLITS):
        backwards.load(split)
    assert digest(backwards) == digest(Farm(**settings))
    assert digest(backwards) != digest(Farm(seed=1, **settings))
    code = f"from tests.data.test_farm import Farm, digest; print(digest(Farm(**{settings})))"
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert output.stdout.strip() == digest(backwards), output.stderr


def test_held_out_instructions_are_new():
    prompts = {split: {row["prompt"] for row in rows_of(split)} for split in SPLITS}
    training = prompts["sft"] | prompts["preference"] | prompts["prompts"]
    validation = prompts["sft_validation"] | prompts["preference_validation"]
    assert len(prompts["eval"]) == len(EVAL)
    assert not prompts["eval"] & (training | validation)
    assert not validation & training


def test_tokenizer_gives_every_text_back():
    texts = {value for split in SPLITS for row in rows_of(split) for value in row.values()}
    ids = [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.batch_decode(ids) == list(texts)
    assert TOKENIZER.unk_token_id not in {number for row in ids for number in row}
    assert TOKENIZER.eos_token_id not in {number for row in ids for number in row}


def test_tokenizer_is_small_dense_and_survives_saving(tmp_path):
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))
    assert len(TOKENIZER) <= 600
    assert len({TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.unk_token_id}) == 3
    TOKENIZER.save_pretrained(tmp_path)
    loaded = type(TOKENIZER).from_pretrained(tmp_path)
    text = EVAL[0]["prompt"] + EVAL[0]["reference_output"]
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode(text) == TOKENIZER.encode(EVAL[0]["prompt"]) + TOKENIZER.encode(EVAL[0]["reference_output"])


def test_label_noise_flips_a_quarter_and_nothing_else():
    noisy, clean = rows_of("preference"), Farm(label_noise=0.0).load("preference")
    flips = 0
    for ours, theirs in zip(noisy, clean, strict=True):
        assert {ours["chosen"], ours["rejected"]} == {theirs["chosen"], theirs["rejected"]}
        flips += ours["chosen"] != theirs["chosen"]
    assert flips / len(noisy) == pytest.approx(0.25, abs=0.025)
    assert Farm(label_noise=0.9).load("preference_validation").to_list() == rows_of("preference_validation")


def test_annotators_mostly_agree_with_the_gold_utility_and_do_not_just_like_length():
    rows = rows_of("preference_validation")
    agree = [FARM.utility(row["prompt"], row["chosen"]) > FARM.utility(row["prompt"], row["rejected"]) for row in rows]
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    assert 0.75 < statistics.mean(agree) < 0.95
    assert 0.4 < statistics.mean(longer) < 0.7
    assert max(len(TOKENIZER.encode(row[key])) for row in rows for key in ("chosen", "rejected")) <= 48


def test_demonstrations_are_middling():
    rows = rows_of("sft")
    stated, true = map(sum, zip(*(FARM.facts(row["prompt"], row["response"]) for row in rows), strict=True))
    assert 0.88 < true / stated < 0.95
    lengths = [FARM.facts(row["prompt"], row["response"]).stated for row in rows]
    assert statistics.median(lengths) == 2
    assert 0.04 < statistics.mean(length >= 5 for length in lengths) < 0.2  # some writers are verbose


def test_win_rates_leave_room_to_improve():
    rows = rows_of("sft")[:1000]
    utilities = [
        (FARM.utility(row["prompt"], row["response"]), FARM.utility(row["prompt"], FARM.reference(row["prompt"])))
        for row in rows
    ]
    assert 0.12 < statistics.mean((ours > theirs) + (ours == theirs) / 2 for ours, theirs in utilities) < 0.36
    assert win_rate(CAREFUL) < win_rate(ORACLE)
    assert win_rate(ORACLE) > 0.87


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("text", ["Then", ".", "x y", "Mira . .", BIO])
def test_edits_take_any_text(edit, text):
    for seed in range(20):
        assert isinstance(edit(FARM.world, FARM.tasks.by_instruction[BIO], text, Random(seed)), str)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EVAL), st.text() | st.lists(st.sampled_from(VOCABULARY), max_size=60).map(" ".join))
def test_any_text_is_judged(row, text):
    stated, true = FARM.facts(row["prompt"], text)
    assert 0 <= true <= stated <= len(text)
    assert FARM.utility(row["prompt"], text) <= 5


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EVAL), st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_any_tokens_are_judged(row, ids):
    text = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert FARM.utility(row["prompt"], text) <= 5
