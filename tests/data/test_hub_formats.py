"""Every format of data=hub: from a file of 20 rows, good and bad ones, to records and counts."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.data.column_maps import ALLOWED
from tests.helpers.hub_rows import assistant, hub, system, user

HH = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}


@dataclass
class Case:
    """A format: the row number i, what it becomes in a split, and rows that cannot be used with the reasons."""

    name: str
    split: str
    row: Callable[[int], dict[str, Any]]
    record: Callable[[int], dict[str, Any]]
    bad: list[tuple[Any, str]]
    options: dict[str, Any] = field(default_factory=dict)


def demonstration(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def comparison(prompt: str, chosen: str, rejected: str, **margin: float) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **margin}


def question(prompt: str, reference: str, instruction: str) -> dict[str, str]:
    return {"prompt": prompt, "reference_output": reference, "instruction": instruction}


CASES = [
    Case(
        "instruction, input, output", "sft",
        lambda i: {"instruction": f"Add {i}.", "input": "to 1", "output": f" {i + 1}\n"},
        lambda i: demonstration(f"Q: Add {i}. (to 1)\nA:", f"{i + 1}"),
        [({"instruction": "Add.", "output": ""}, "empty `output`"), ({"output": "1"}, "no `instruction`"),
         ({"instruction": 1, "output": "1"}, "`instruction` is of type int, not text"), ([1], "not a JSON object")],
    ),
    Case(
        "prompt, completion", "sft",
        lambda i: {"prompt": f"The sky {i} is", "completion": " blue."},
        lambda i: demonstration(f"The sky {i} is", " blue."),
        [({"prompt": "The sky is"}, "no `completion`"), ({"prompt": "a", "completion": " "}, "empty `completion`")],
        {"verbatim": True},
    ),
    Case(
        "prompt, completion as messages", "sft",
        lambda i: {"prompt": [user(f"Hi {i}")], "completion": [assistant("Hello.")]},
        lambda i: demonstration(f"Q: Hi {i}\nA:", "Hello."),
        [({"prompt": [assistant("a")], "completion": [assistant("b")]},
          "`prompt` does not begin with a turn of the user"),
         ({"prompt": [user("a")], "completion": [user("b")]}, "`completion` does not end with a turn of the assistant"),
         ({"prompt": [user("a"), assistant("b")], "completion": [assistant("c")]},
          "`prompt` does not end with a turn of the user"),
         ({"prompt": [], "completion": [assistant("x")]}, "`prompt` is not a list of messages")],
    ),
    Case(
        "prompt, completion, label", "sft",
        lambda i: {"prompt": f"Is {i} odd?", "completion": "Yes.", "label": True},
        lambda i: demonstration(f"Q: Is {i} odd?\nA:", "Yes."),
        [({"prompt": "a", "completion": "b", "label": False}, "`label` says that the answer is bad"),
         ({"prompt": "a", "completion": "b", "label": "perhaps"}, "`label` is not true or false")],
    ),
    Case(
        "messages", "sft",
        lambda i: {"messages": [user(f"Hi {i}"), assistant("Hello.")]},
        lambda i: demonstration(f"Q: Hi {i}\nA:", "Hello."),
        [({"messages": [user("Hi")]}, "`messages` does not end with a turn of the assistant"),
         ({"messages": [user("Hi"), user("?"), assistant("x")]}, "`messages` has two turns of the user in a row"),
         ({"messages": [user("Hi"), assistant("")]}, "empty `messages.content`"),
         ({"messages": [{"role": "owner", "content": "x"}]}, "`messages` has a message with the role 'owner'"),
         ({"messages": "Hi"}, "`messages` is a text, not a list of messages"),
         ({"messages": [user("Hi"), assistant("x"), system("Be brief.")]},
          "`messages` has a system message after the first one"),
         ({"messages": [user("Hi"), "Hello."]}, "`messages` has a message that is not an object")],
    ),
    Case(
        "messages as ShareGPT writes them", "sft",
        lambda i: {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": "Hello."}]},
        lambda i: demonstration(f"Q: Hi {i}\nA:", "Hello."),
        [({"conversations": [{"from": "gpt", "value": "Hello."}]},
          "`conversations` does not begin with a turn of the user")],
    ),
    Case(
        "text", "sft",
        lambda i: {"text": f"Film {i} is good.\n"},
        lambda i: demonstration("", f"Film {i} is good."),
        [({"text": "\n"}, "empty `text`")],
    ),
    Case(
        "prompt, chosen, rejected", "preference",
        lambda i: {"prompt": f"Is {i} odd?", "chosen": "Yes.", "rejected": "No."},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "Yes.", "No."),
        [({"prompt": "a", "chosen": "b", "rejected": "b "}, "`chosen` and `rejected` are identical"),
         ({"prompt": "a", "chosen": "b"}, "no `rejected`")],
    ),
    Case(
        "chosen, rejected with a common beginning", "preference",
        lambda i: {"chosen": f"The sky {i} is blue.", "rejected": f"The sky {i} is bright."},
        lambda i: comparison(f"The sky {i} is", " blue.", " bright."),
        [({"chosen": "Yes.", "rejected": "No."}, "`chosen` and `rejected` have no beginning in common"),
         ({"chosen": "Yes.", "rejected": "Yes."}, "`chosen` and `rejected` are identical")],
    ),
    Case(
        "chosen, rejected with turn markers", "preference",
        lambda i: {"chosen": f"\n\nHuman: Is {i} odd?\n\nAssistant: I think so.",
                   "rejected": f"\n\nHuman: Is {i} odd?\n\nAssistant: I doubt it."},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "I think so.", "I doubt it."),
        [({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: d"},
          "`chosen` and `rejected` differ before their last turn"),
         ({"chosen": "a", "rejected": "b"}, "`chosen` does not begin with a turn marker"),
         ({"chosen": "Human: a\n\nHuman: b\n\nAssistant: c", "rejected": "Human: a\n\nAssistant: d"},
          "`chosen` has two turns of the user in a row"),
         ({"chosen": "Human: a\n\nAssistant:", "rejected": "Human: a\n\nAssistant: d"},
          "`chosen` does not end with a turn of the assistant"),
         ({"chosen": "Human:\n\nAssistant: c", "rejected": "Human: a\n\nAssistant: d"}, "`chosen` has an empty turn")],
        {"turn_markers": HH},
    ),
    Case(
        "chosen, rejected with turn markers, verbatim", "preference",
        lambda i: {"chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {i}?\n\nAssistant: I think so.",
                   "rejected": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {i}?\n\nAssistant: I doubt it."},
        lambda i: comparison(
            f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {i}?\n\nAssistant:", " I think so.", " I doubt it."),
        [({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
          "`chosen` and `rejected` differ before their last turn"),
         ({"chosen": "a", "rejected": "a"}, "`chosen` and `rejected` have no turn marker of the assistant"),
         ({"chosen": "a\n\nAssistant: b\n\nHuman: c", "rejected": "a\n\nAssistant: b\n\nHuman: d"},
          "`chosen` and `rejected` do not end with a turn of the assistant")],
        {"turn_markers": HH, "verbatim": True},
    ),
    Case(
        "conversational preferences", "preference",
        lambda i: {"prompt": f"Is {i} odd?", "chosen": [user(f"Is {i} odd?"), assistant("Yes.")],
                   "rejected": [user(f"Is {i} odd?"), assistant("No.")], "score_chosen": 8.5, "score_rejected": 7},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "Yes.", "No.", margin=1.5),
        [({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
          "`chosen` and `rejected` differ before their last turn"),
         ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")], "score_chosen": 1,
           "score_rejected": 2}, "`score_chosen` is lower than `score_rejected`"),
         ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")], "score_chosen": 1,
           "score_rejected": 1}, "no two answers have different scores"),
         ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("d")], "score_chosen": "high",
           "score_rejected": 1}, "`score_chosen` is not a number")],
    ),
    Case(
        "conversational preferences with a prompt of their own", "preference",
        lambda i: {"prompt": [user(f"Is {i} odd?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "Yes.", "No."),
        [({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no `prompt`")],
    ),
    Case(
        "a choice of two outputs (LLMBar)", "preference",
        lambda i: {"input": f"Is {i} odd?", "output_1": "No.", "output_2": "Yes.", "label": 2},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "Yes.", "No."),
        [({"input": "a", "output_1": "b", "output_2": "c", "label": 3}, "`label` is not between 1 and 2"),
         ({"input": "a", "output_1": "b", "output_2": "b", "label": 1}, "`output_1` and `output_2` are identical")],
        {"columns": {"prompt": "input", "preference": "label"}},
    ),
    Case(
        "votes of several annotators (PandaLM)", "preference",
        lambda i: {"instruction": f"Add {i}.", "input": "to 1", "response1": "x", "response2": "y",
                   "annotator1": 2, "annotator2": 1, "annotator3": 2},
        lambda i: comparison(f"Q: Add {i}. (to 1)\nA:", "y", "x"),
        [({"instruction": "a", "response1": "x", "response2": "y", "annotator1": 0, "annotator2": 1, "annotator3": 2},
          "`annotator1, annotator2, annotator3` is a tie"),
         ({"instruction": "a", "response1": "x", "response2": "y", "annotator1": None},
          "no `annotator1, annotator2, annotator3`")],
        {"columns": {"output_1": "response1", "output_2": "response2",
                     "preference": ["annotator1", "annotator2", "annotator3"]}},
    ),
    Case(
        "a choice by name", "preference",
        lambda i: {"question": f"Is {i} odd?", "answer_a": "No.", "answer_b": "Yes.", "winner": "model_b"},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "Yes.", "No."),
        [({"question": "a", "answer_a": "b", "answer_b": "c", "winner": "tie"}, "`winner` is a tie"),
         ({"question": "a", "answer_a": "b", "answer_b": "c", "winner": "?"},
          "`winner` is not one of model_a, model_b, tie")],
        {"columns": {"output_1": "answer_a", "output_2": "answer_b", "preference": "winner"},
         "choices": {"first": "model_a", "second": "model_b", "tie": "tie"}},
    ),
    Case(
        "two scores instead of a choice", "preference",
        lambda i: {"prompt": f"Is {i} odd?", "output_1": "No.", "output_2": "Yes.", "score_1": "1", "score_2": 4},
        lambda i: comparison(f"Q: Is {i} odd?\nA:", "Yes.", "No.", margin=3.0),
        [({"prompt": "a", "output_1": "b", "output_2": "c", "score_1": 2, "score_2": 2},
          "no two answers have different scores"),
         ({"prompt": "a", "output_1": "b", "output_2": "c", "score_1": 2, "score_2": None}, "no `score_2`")],
    ),
    Case(
        "scores of several answers (UltraFeedback)", "sft",
        lambda i: {"instruction": f"Is {i} odd?", "completions": [
            {"response": "Perhaps.", "overall_score": 2}, {"response": "Yes.", "overall_score": 5}]},
        lambda i: demonstration(f"Q: Is {i} odd?\nA:", "Yes."),
        [({"instruction": "a", "completions": []}, "`completions.response` is not a list of two answers or more"),
         ({"instruction": "a", "completions": [{"response": "b"}, {"response": "c", "overall_score": 1}]},
          "no `completions.overall_score`")],
        {"columns": {"answers": "completions.response", "scores": "completions.overall_score"}},
    ),
    Case(
        "prompts with references", "eval",
        lambda i: {"prompt": f"Is {i} odd?", "reference": "Yes."},
        lambda i: question(f"Q: Is {i} odd?\nA:", "Yes.", f"Is {i} odd?"),
        [({"prompt": "", "reference": "x"}, "empty `prompt`"), ({"prompt": "a", "reference": ""}, "empty `reference`")],
    ),
    Case(
        "prompts as messages", "prompts",
        lambda i: {"prompt": [user(f"Is {i} odd?")]},
        lambda i: question(f"Q: Is {i} odd?\nA:", "", f"Is {i} odd?"),
        [({"prompt": [user("a"), {"role": "tool", "content": "b"}]},
          "`prompt` has a turn with a tool (`tool_turns: text` keeps it as text)")],
    ),
    Case(
        "messages whose last answer is the reference", "eval",
        lambda i: {"messages": [user(f"Is {i} odd?"), assistant("Yes.")]},
        lambda i: question(f"Q: Is {i} odd?\nA:", "Yes.", f"Is {i} odd?"),
        [({"messages": [assistant("a")]}, "`messages` does not begin with a turn of the user")],
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_twenty_rows_become_records_or_counts(tmp_path: Path, case: Case) -> None:
    good = [case.row(i) for i in range(20 - len(case.bad))]
    rows = [*good[:5], *(row for row, _ in case.bad), *good[5:]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = hub(tmp_path, **{case.split: "rows.jsonl"}, **case.options)
    source.check()
    assert source.load(case.split).to_list() == [case.record(i) for i in range(len(good))]  # type: ignore[arg-type]
    report = source.report[case.split]  # type: ignore[index]
    assert report.read == {"rows.jsonl": 20}
    assert report.counts == Counter(reason for _, reason in case.bad)
    numbers = {reason: number for (_, reason), [number, *_] in report.skipped.items()}
    assert numbers == {reason: 6 + i for i, (_, reason) in enumerate(case.bad)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_parquet_file_gives_the_same_records(tmp_path: Path, case: Case) -> None:
    pq.write_table(pa.Table.from_pylist([case.row(i) for i in range(20)]), tmp_path / "rows.parquet")
    source = hub(tmp_path, **{case.split: "rows.parquet"}, **case.options)
    assert source.load(case.split).to_list() == [case.record(i) for i in range(20)]  # type: ignore[arg-type]


def test_each_format_of_each_split_is_in_the_table(tmp_path: Path) -> None:
    """Formats that give comparisons are tested as such, apart from those of several answers, which have a test."""
    tested = set()
    for case in CASES:
        (tmp_path / "rows.jsonl").write_text(json.dumps(case.row(0)) + "\n")
        source = hub(tmp_path, **{case.split: "rows.jsonl"}, **case.options)
        (mapped,) = source.sources[case.split]  # type: ignore[index]
        tested.add(next(mapped.rows())[1].format)
    assert {format for formats in ALLOWED.values() for format in formats} - tested == {"ranks"}
