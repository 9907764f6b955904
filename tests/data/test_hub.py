"""data=hub: recognition and maps of columns, conversations, ties, pairs, and what is held out."""

import json
from collections import Counter
from typing import Any

import datasets
import pytest

from rlhf.data import sources
from rlhf.data.alpaca import Alpaca
from rlhf.data.records import ScoredComparison, as_records, columns
from rlhf.errors import DataError
from tests.helpers.chat_models import save_chat_tokenizer
from tests.helpers.data_readers import TEMPLATE
from tests.helpers.hub_rows import assistant, hub, system, user

SCORED = {"prompt": "Which?", "answers": ["a", "b", "c", "d"], "scores": [1, 3, 2, 3]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}


# -- columns -----------------------------------------------------------------------------------------------------------


def test_unknown_columns_are_refused_before_anything_is_read(tmp_path):
    source = hub(
        tmp_path, sft=[{"prompt": "a", "completion": "b"}], preference=[{"query": "a", "best": "b", "worst": "c"}]
    )
    with pytest.raises(DataError) as failure:
        source.check()
    assert str(failure.value) == (
        "data.preference: preference.jsonl has the columns query, best, worst, which make none of the known formats; "
        "allowed: chosen + rejected; prompt + output_1 + output_2 + preference; prompt + output_1 + output_2 + score_1 "
        "+ score_2; prompt + answers + scores; prompt + answers + ranks (data.columns={FIELD: COLUMN, …} says which "
        "column is which field)."
    )
    names = {"prompt": "query", "chosen": "best", "rejected": "worst"}
    mapped = {"source": "preference.jsonl", "columns": names}
    source = hub(tmp_path, sft="sft.jsonl", preference=mapped)  # the map of one source leaves the others alone
    source.check()
    assert source.load("preference").to_list() == [{"prompt": "Q: a\nA:", "chosen": "b", "rejected": "c"}]
    assert source.load("sft").to_list() == [{"prompt": "Q: a\nA:", "response": "b"}]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"columns": {"prompts": "a"}},
            r"columns=\{'prompts': 'a'\} is not allowed; allowed: a mapping .* from some of ",
        ),
        ({"columns": ["a"]}, "is not allowed; allowed: a mapping"),
        ({"columns": {"prompt": 1}}, "is not allowed; allowed: a mapping"),
        (
            {"preference": {"source": "x.jsonl", "format": "pairs"}},
            "data.preference has the keys source, format; allowed",
        ),
        ({"ties": "drop"}, "ties='drop' is not allowed; allowed: skip, first, random"),
        ({"tool_turns": "keep"}, "tool_turns='keep' is not allowed; allowed: refuse or text"),
        ({"assistant_turns": 2}, "assistant_turns=2 is not allowed; allowed: last or all"),
        ({"choices": {"first": 1}}, "allowed: a mapping from first, second and optionally tie"),
        ({"choices": {"first": 1, "second": [1, 2]}}, "allowed: a mapping from first, second and optionally tie"),
        ({"turn_markers": {"user": "A:", "assistant": "A:"}}, "allowed: null, or a mapping with two different texts"),
        ({"min_margin": -1}, "min_margin=-1 is not allowed; allowed: a number from 0"),
        ({"max_pairs_per_prompt": 0}, "max_pairs_per_prompt=0 is not allowed; allowed: a positive integer"),
        ({"held_out": 1}, "held_out=1 is not allowed; allowed: a share between 0 and 1"),
        ({"held_out": {"eval": 0.1}}, "allowed: a share between 0 and 1, or a mapping"),
        ({"held_out": {"sft": 0.1}}, "held_out.sft=0.1: data.sft has no source"),
        ({"held_out": {"preference": 0.1}, "preference_validation": "x.jsonl"}, "preference_validation has a source"),
    ],
)
def test_configuration_mistakes_are_refused(tmp_path, options, sentence):
    with pytest.raises(DataError, match=sentence):
        hub(tmp_path, **{"preference": "x.jsonl"} | options)


def test_a_mapped_column_must_exist(tmp_path):
    source = hub(tmp_path, sft=[{"prompt": "a", "completion": "b"}], columns={"completion": "reply"})
    with pytest.raises(DataError, match=r"columns\.completion=reply: sft\.jsonl has no such column; allowed: prompt, "):
        source.check()


def test_a_map_decides_between_formats_and_null_hides_a_column(tmp_path):
    row = {"messages": [user("a"), assistant("b")], "prompt": "c", "completion": "d", "summary": "e", "input": "f"}
    assert hub(tmp_path, sft=[row]).load("sft")["response"] == ["b"]
    mapped = hub(tmp_path, sft="sft.jsonl", columns={"completion": "summary"})
    assert mapped.load("sft").to_list() == [{"prompt": "Q: c (f)\nA:", "response": "e"}]
    hidden = hub(tmp_path, sft="sft.jsonl", columns={"completion": "summary", "input": None})
    assert hidden.load("sft")["prompt"] == ["Q: c\nA:"]


def test_columns_of_later_rows_count_and_a_file_of_bad_rows_is_told_as_such(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "completion": "c"}]
    assert hub(tmp_path, sft=rows).load("sft")["response"] == ["c"]
    (tmp_path / "bad.jsonl").write_text("{\n[\n")
    with pytest.raises(DataError, match=r"^sft: no row of bad\.jsonl can be used \(2 × malformed JSON\)\.$"):
        hub(tmp_path, sft="bad.jsonl").load("sft")


def test_a_hub_id_names_revision_config_and_split(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    for spec, options in [
        ("owner/name@v1.0:en:test", {"revision": "v1.0", "name": "en", "split": "test"}),
        ("owner/name@refs/convert/parquet", {"revision": "refs/convert/parquet", "split": "train"}),
        ("owner/name:test", {"split": "test"}),
        ({"source": {"path": "owner/name", "revision": "abc"}}, {"revision": "abc", "split": "train"}),
    ]:
        assert len(hub(tmp_path, sft=spec).load("sft")) == 1
        assert asked.pop() == (("owner/name",), options)


# -- conversations -----------------------------------------------------------------------------------------------------


def test_tools_are_kept_as_text(tmp_path):
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    row = {"messages": [user("Add."), CALL, *results, assistant("3")]}
    source = hub(tmp_path, prompts=[{"messages": [user("Hi")]}, row, row], tool_turns="refuse")
    assert len(source.load("prompts")) == 1
    assert source.report["prompts"].counts == {
        "`messages` has a turn with a tool (`tool_turns: text` keeps it as text)": 2
    }
    source = hub(tmp_path, eval=[{"messages": [user("Add."), CALL]}], tool_turns="text")
    assert source.load("eval")["reference_output"] == ['[{"name": "add", "arguments": {"a": 1}}]']


def test_contents_in_parts_are_joined_and_images_are_refused(tmp_path):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    rows = [{"messages": [user("Hi"), {"role": "assistant", "content": content}]}
            for content in (parts, [*parts, {"type": "image", "url": "x"}], [1])]  # fmt: skip
    source = hub(tmp_path, sft=rows)
    assert source.load("sft")["response"] == ["Hello."]
    assert source.report["sft"].counts == {
        "`messages` has a part of type 'image', not text": 1,
        "`messages` has a part of type 'none', not text": 1,
    }


# -- answers -----------------------------------------------------------------------------------------------------------


def test_all_pairs_of_different_scores_keep_their_margins(tmp_path):
    source = hub(tmp_path, preference=[SCORED, SCORED | {"prompt": "Bad?", "scores": [1, 1, 1, 1]}])
    rows = source.load("preference")
    pairs = [("b", "a", 2.0), ("b", "c", 1.0), ("c", "a", 1.0), ("d", "a", 2.0), ("d", "c", 1.0)]
    assert sorted((row["chosen"], row["rejected"], row["margin"]) for row in rows) == pairs
    assert source.report["preference"].read == {"preference.jsonl": 2}
    assert source.report["preference"].counts == {"no two answers have different scores": 1}
    assert isinstance(as_records(rows, "preference")[0], ScoredComparison)
    ranked = hub(tmp_path, preference=[{"prompt": "Which?", "answers": list("abcd"), "ranks": ["4", "1", "2", "1"]}])
    ranked_rows = ranked.load("preference")
    assert ranked_rows.column_names == columns("preference")  # the difference of two ranks is no margin
    assert sorted((row["chosen"], row["rejected"]) for row in ranked_rows) == [pair[:2] for pair in pairs]


def test_the_number_of_pairs_and_their_margin_are_bounded(tmp_path):
    few = hub(tmp_path, preference=[SCORED], max_pairs_per_prompt=2).load("preference").to_list()
    assert len(few) == 2
    assert few == hub(tmp_path, preference="preference.jsonl", max_pairs_per_prompt=2).load("preference").to_list()
    drawn = {json.dumps(hub(tmp_path, preference="preference.jsonl", max_pairs_per_prompt=2, seed=seed)
                        .load("preference").to_list()) for seed in range(5)}  # fmt: skip
    assert len(drawn) > 1
    clear = hub(tmp_path, preference="preference.jsonl", min_margin=1.5).load("preference")
    assert sorted(zip(clear["chosen"], clear["rejected"], strict=True)) == [("b", "a"), ("d", "a")]


@pytest.mark.parametrize(
    "tie", [{"preference": 0}, {"preference": 1.5}, {"score_1": 2, "score_2": 2}], ids=["0", "1.5", "scores"]
)
def test_ties_go_by_the_rule(tmp_path, tie):
    rows = [{"prompt": f"{i}?", "output_1": f"one {i}", "output_2": f"two {i}", **tie} for i in range(40)]
    with pytest.raises(DataError, match=r"^preference: no row of preference\.jsonl can be used \(40 × "):
        hub(tmp_path, preference=rows).load("preference")
    first = hub(tmp_path, preference="preference.jsonl", ties="first").load("preference")
    assert first["chosen"] == [f"one {i}" for i in range(40)]
    chosen = hub(tmp_path, preference="preference.jsonl", ties="random").load("preference")["chosen"]
    assert 10 <= sum(text.startswith("one") for text in chosen) <= 30
    assert chosen == hub(tmp_path, preference="preference.jsonl", ties="random").load("preference")["chosen"]
    assert chosen != hub(tmp_path, preference="preference.jsonl", ties="random", seed=1).load("preference")["chosen"]


def test_comparisons_are_told_apart_by_margin(tmp_path):
    rows = [
        {"prompt": f"{i}?", "chosen": "a", "rejected": "b", "score_chosen": i, "score_rejected": 0} for i in (1, 2, 9)
    ]
    source = hub(tmp_path, preference_validation=[*rows, {"prompt": "?", "chosen": "a", "rejected": "b"}])
    assert source.kinds() == ["margin up to 2", "margin up to 2", "margin above 2", "no margin"]
    assert hub(tmp_path, preference_validation=rows[:1]).kinds() == []


def test_the_answer_to_learn_is_the_best_one(tmp_path):
    choice = {"prompt": "?", "output_1": "x", "output_2": "y", "preference": 2}
    assert hub(tmp_path, sft=[choice]).load("sft")["response"] == ["y"]
    assert hub(tmp_path, sft=[SCORED]).load("sft")["response"] == ["b"]
    assert hub(tmp_path, sft=[{"prompt": "?", "chosen": "x", "rejected": "y"}]).load("sft")["response"] == ["x"]
    assert hub(tmp_path, sft=[SCORED | {"ranks": [2, 2, 1, 3], "scores": None}], columns={"scores": None}).load("sft")[
        "response"
    ] == ["c"]


# -- splits ------------------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_in_no_training_split(tmp_path):
    rows = [{"prompt": f"Question {i % 100}", "chosen": f"a{i}", "rejected": "b"} for i in range(200)]
    source = hub(tmp_path, preference=rows, sft="preference.jsonl", prompts="preference.jsonl",
                 held_out={"preference": 0.3, "sft": 0.3, "prompts": 0.1})  # fmt: skip
    assert source.splits == ("sft", "sft_validation", "preference", "preference_validation", "prompts", "eval")
    prompts = {split: set(source.load(split)["prompt"]) for split in source.splits}
    assert prompts["preference"].isdisjoint(prompts["preference_validation"])
    assert not (prompts["preference"] | prompts["sft"] | prompts["prompts"]) & prompts["eval"]
    assert len(prompts["preference"] | prompts["preference_validation"]) == 100
    assert 20 <= len(prompts["preference_validation"]) <= 40
    assert 5 <= len(prompts["eval"]) <= 20
    assert prompts["eval"] <= prompts["sft_validation"] == prompts["preference_validation"]  # by one hash
    assert source.report["preference"].counts == {}  # a row of another split is no bad row
    read = Counter(source.report["preference"].read) + Counter(source.report["preference_validation"].read)
    assert read == {"preference.jsonl": 200}
    assert set(source.concerns["preference"]) == {"preference", "preference_validation"}
    assert {"eval", "sft", "preference"} <= set(source.concerns["prompts"])


def test_evaluation_instructions_are_never_trained_on(tmp_path):
    rows = [{"prompt": " write a POEM", "completion": "x"}, {"prompt": "Sing.", "completion": "y"}]
    source = hub(tmp_path, sft=rows, eval=[{"prompt": "Write a poem", "completion": "z"}])
    assert source.load("sft")["response"] == ["y"]
    assert source.report["sft"].counts == {"instruction is in the evaluation set": 1}
    assert source.load("eval")["reference_output"] == ["z"]


def test_rows_are_the_same_as_those_of_alpaca(tmp_path):
    pair = {
        "instruction": "Add.",
        "input": "1 2",
        "output": " 3\n",
        "output_1": "3",
        "output_2": "4",
        "preference": "1.2",
    }
    rows = [pair, pair | {"instruction": "Say hi.", "input": "", "preference": 2}]
    splits = dict.fromkeys(("sft", "preference", "eval"), rows)
    mine = hub(tmp_path, **splits, exclude_eval_instructions=False)
    files = {split: f"{split}.jsonl" for split in splits}
    alpaca = Alpaca(template=TEMPLATE, root=str(tmp_path), exclude_eval_instructions=False, **files)
    for split in splits:
        assert mine.load(split).to_list() == alpaca.load(split).to_list(), split


def test_conversations_of_several_turns_go_through_a_chat_template(tmp_path):
    chat = {"name_or_path": str(save_chat_tokenizer("chatml", tmp_path / "tokenizer"))}
    row = {"messages": [system("Be brief."), user("Hi"), assistant("Hello."), user("Why?"), assistant("So.")]}
    first = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    second = f"{first}Hello.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    last = {"prompt": second, "response": "So."}
    assert hub(tmp_path, sft=[row], template=chat).load("sft").to_list() == [last]
    every = hub(tmp_path, sft="sft.jsonl", template=chat, assistant_turns="all").load("sft")
    assert every.to_list() == [{"prompt": first, "response": "Hello."}, last]
    asked = hub(tmp_path, eval="sft.jsonl", template=chat).load("eval").to_list()
    shown = "System: Be brief.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: Why?"
    assert asked == [{"prompt": second, "reference_output": "So.", "instruction": shown}]
    refused = hub(tmp_path, sft=[row, {"messages": [user("Hi"), assistant("x")]}])
    assert refused.load("sft")["response"] == ["x"]
    (reason,) = refused.report["sft"].counts
    assert "data/template=chat" in reason
