"""The Alpaca format: fields, templates, leaks between splits, and the real files if they are available."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.alpaca import Alpaca
from rlhf.data.records import SPLITS, columns
from rlhf.errors import DataError
from tests.helpers.composed_config import composed_data

ROOT = Path(__file__).parents[2]
TEMPLATE = {"with_input": "Q: {instruction} ({input})\nA:", "without_input": "Q: {instruction}\nA:"}


def alpaca(root: Path, **options: Any) -> Alpaca:
    """Make an `Alpaca`; splits given as lists of rows are written to files first."""
    for split in set(options) & set(SPLITS):
        if isinstance(options[split], list) and isinstance(options[split][0], dict):
            (root / f"{split}.json").write_text(json.dumps(options[split]))
            options[split] = f"{split}.json"
    return Alpaca(**{"root": str(root), "template": TEMPLATE} | options)


def demonstration(instruction: str, input: str = "", output: str = "An answer.") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output}


def comparison(preference: Any, **fields: Any) -> dict[str, Any]:
    return (
        {"instruction": "Do", "input": "it", "output_1": " one\n", "output_2": "two"}
        | fields
        | {"preference": preference}
    )


def test_demonstrations_prompts_and_evaluation_share_the_prompt(tmp_path):
    rows = [demonstration(" Add.\n", "1 2", "\n 3 \n"), {"instruction": "Say hi.", "output": "hi"}]
    source = alpaca(tmp_path, sft=rows, sft_validation=rows, prompts=rows, eval=rows, exclude_eval_instructions=False)
    with_input, without_input = "Q: Add. (1 2)\nA:", "Q: Say hi.\nA:"
    demonstrations = [{"prompt": with_input, "response": "3"}, {"prompt": without_input, "response": "hi"}]
    prompts = [
        {"prompt": with_input, "reference_output": "3", "instruction": "Add.\n\n1 2"},
        {"prompt": without_input, "reference_output": "hi", "instruction": "Say hi."},
    ]
    assert source.load("sft").to_list() == source.load("sft_validation").to_list() == demonstrations
    assert source.load("eval").to_list() == prompts
    assert source.load("prompts").to_list() == [{**prompt, "reference_output": ""} for prompt in prompts]


def test_evaluation_rows_need_no_output(tmp_path):
    bare = {"instruction": "C"}
    source = alpaca(tmp_path, eval=[demonstration("A"), {**bare, "output": None}, {**bare, "instruction": "D"}])
    assert [bool(row["reference_output"]) for row in source.load("eval")] == [True, False, False]


def test_an_empty_output_makes_no_reference(tmp_path):
    source = alpaca(tmp_path, prompts=[demonstration("A", output="")], eval=[demonstration("B", output="")])
    with pytest.raises(DataError, match=r"^eval: no row of eval\.json can be used \(1 × empty `output`\)\.$"):
        source.load("eval")
    assert len(alpaca(tmp_path, prompts="prompts.json").load("prompts")) == 1


@pytest.mark.parametrize("preference", [1, 2, 1.0, 2.0, "1", " 2", "1.0", 1.02, 1.98, 1.4999, "1.98"])
def test_the_preference_selects_the_chosen_output(tmp_path, preference):
    rows = alpaca(tmp_path, preference=[comparison(preference)]).load("preference")
    chosen, rejected = ("one", "two") if float(preference) < 1.5 else ("two", "one")
    assert rows.to_list() == [{"prompt": "Q: Do (it)\nA:", "chosen": chosen, "rejected": rejected}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (comparison(0), "`preference` is a tie"),
        (comparison(1.5), "`preference` is a tie"),
        *(
            (comparison(value), "`preference` is not between 1 and 2")
            for value in (3, -1, 2.01, 0.98, True, None, "x", [1], {})
        ),
        (comparison(float("nan")), "`preference` is not between 1 and 2"),
        ({k: v for k, v in comparison(1).items() if k != "preference"}, "no `preference`"),
        (comparison(1, output_2="one "), "`output_1` and `output_2` are identical"),
        (comparison(1, output_2=""), "empty `output_2`"),
        (comparison(2, output_1=[{"role": "assistant", "content": "one"}]), "`output_1` is of type list, not text"),
        (comparison(2, instruction=None), "no `instruction`"),
        (comparison(2, input=3), "`input` is of type int, not text"),
    ],
)
def test_bad_comparison_is_counted(tmp_path, row, reason):
    source = alpaca(tmp_path, preference_validation=[row, comparison(2)])
    assert source.load("preference_validation")["chosen"] == ["two"]
    assert source.report["preference_validation"].counts == {reason: 1}


def test_evaluation_instructions_are_never_trained_on(tmp_path):
    rows = [demonstration("Write  a POEM\n"), demonstration("Write a poem", "on rain"), demonstration("Write a novel")]
    comparisons = [comparison(1, instruction=row["instruction"], input=row["input"]) for row in rows]
    training = {"sft": rows, "prompts": rows, "preference": comparisons}
    held_out = [demonstration("write a poem"), demonstration("Write a poem\n\non rain"), demonstration("Sing")]
    source = alpaca(tmp_path, **training, preference_validation=comparisons, eval=held_out, max_rows={"eval": 1})
    for split in training:
        assert source.load(split)["prompt"] == ["Q: Write a novel\nA:"]
        assert source.report[split].counts == {"instruction is in the evaluation set": 2}
    assert len(source.load("preference_validation")) == 3
    assert len(source.load("eval")) == 1  # all three are excluded nevertheless
    assert len(alpaca(tmp_path, sft="sft.json", eval="eval.json", exclude_eval_instructions=False).load("sft")) == 3


def test_changed_evaluation_set_changes_what_is_excluded(tmp_path):
    rows = [demonstration("A"), demonstration("B")]
    for held_out, left in (("A", "Q: B\nA:"), ("B", "Q: A\nA:")):
        assert alpaca(tmp_path, sft=rows, eval=[demonstration(held_out)]).load("sft")["prompt"] == [left]


def test_changed_template_changes_the_prompts(tmp_path):
    for mark in ("?", "!"):
        template = TEMPLATE | {"without_input": "{instruction}" + mark}
        assert alpaca(tmp_path, sft=[demonstration("A")], template=template).load("sft")["prompt"] == [f"A{mark}"]


def test_max_rows_takes_the_first(tmp_path):
    rows = [demonstration("A", output=""), *(demonstration(name) for name in "BCD")]
    assert alpaca(tmp_path, sft=rows, max_rows=2).load("sft")["prompt"] == ["Q: B\nA:", "Q: C\nA:"]
    assert len(alpaca(tmp_path, sft="sft.json", max_rows={"sft": 9, "prompts": 1}).load("sft")) == 3


def test_a_split_may_have_several_sources(tmp_path):
    alpaca(tmp_path, sft=[demonstration(name) for name in "ABC"], prompts=[demonstration("D")])
    source = alpaca(tmp_path, sft=["sft.json[1:]", "prompts.json"])
    assert source.load("sft")["prompt"] == ["Q: B\nA:", "Q: C\nA:", "Q: D\nA:"]
    assert source.report["sft"].read == {"sft.json[1:]": 2, "prompts.json": 1}


def test_only_configured_splits_are_offered(tmp_path):
    source = alpaca(tmp_path, sft=[demonstration("A")], eval=[demonstration("B")])
    assert source.splits == ("sft", "eval")
    for split in source.splits:
        assert source.load(split).column_names == columns(split)
    with pytest.raises(DataError, match=r"^data\.preference is not configured; allowed: sft, eval\.$"):
        source.load("preference")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore' is not allowed; allowed: skip or fail"),
        ({"max_rows": 0}, "max_rows=0 is not allowed; allowed: a positive integer"),
        ({"max_rows": True}, "max_rows=True is not allowed; allowed: a positive integer"),
        ({"max_rows": {"train": 5}}, "or a mapping to positive integers from some of sft, "),
        ({"sft": "x.jsonl[5:1]"}, "malformed slice"),
        ({"sft": ["x.jsonl", 3]}, "3 is not a data source"),
        ({"template": "alpaca"}, "a mapping with the strings"),
        ({"template": {"with_input": "{instruction}{input}"}}, "a mapping with the strings"),
        ({"template": TEMPLATE | {"with_input": None}}, "a mapping with the strings"),
        ({"template": TEMPLATE | {"without_input": "Say:"}}, "template.without_input must use exactly {instruction}"),
    ],
)
def test_configuration_mistake_is_refused_before_anything_is_read(tmp_path, options, sentence):
    with pytest.raises(DataError) as failure:
        alpaca(tmp_path, **options)
    assert sentence in str(failure.value)


def test_check_names_the_split_and_the_path(tmp_path):
    with pytest.raises(DataError, match=r"^data\.prompts: .*/nosuch\.jsonl does not exist: "):
        alpaca(tmp_path, sft=[demonstration("A")], prompts="nosuch.jsonl").check()
    with pytest.raises(DataError, match=r"^data=alpaca needs a source for at least one split; allowed: sft, "):
        alpaca(tmp_path).check()


def test_default_templates_are_alpaca_s_to_the_letter(tmp_path):
    rows = [demonstration("Add.", "1 2"), demonstration("Say hi.")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    others = [f"data.{split}=null" for split in SPLITS if split != "sft"]
    overrides = [f"data.root={tmp_path}", "data.sft=rows.json", *others]
    assert composed_data("alpaca", *overrides).load("sft")["prompt"] == [
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:",
    ]
    assert composed_data("alpaca", *overrides, "data/template=short").load("sft")["prompt"] == [
        "Instruction: Add.\nInput: 1 2\nResponse:\n",
        "Instruction: Say hi.\nResponse:\n",
    ]
    own = "data.template.without_input='{instruction} ->'"
    assert composed_data("alpaca", *overrides, own).load("sft")["prompt"][1] == "Say hi. ->"


def test_another_process_finds_the_cache(tmp_path, datasets_cache):
    """The cache key contains the evaluation instructions, a set whose order differs between processes."""
    held_out = [demonstration(str(number)) for number in range(50)]
    source = alpaca(tmp_path, sft=[demonstration("A")], eval=held_out)
    program = f"""
from rlhf.data.alpaca import Alpaca
source = Alpaca(root={str(tmp_path)!r}, template={TEMPLATE!r}, sft="sft.json", eval="eval.json")
print(source.load("sft")._fingerprint)
"""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(datasets_cache),
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(ROOT),
    }
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == source.load("sft")._fingerprint


@pytest.mark.real
@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA names no folder")
def test_the_real_files_can_be_read():
    real = os.environ["RLHF_REAL_DATA"]
    source = composed_data("alpaca", f"data.root={real}")
    source.check()
    assert {split: len(source.load(split)) for split in source.splits} == {
        "sft": 5996,
        "preference": 9978,
        "preference_validation": 1995,
        "prompts": 5225,
        "eval": 205,
    }
    assert source.report["sft"].counts == {"empty `output`": 4}
    assert source.report["sft"].skipped["alpaca/alpaca_11k.jsonl.gz[:6000]", "empty `output`"][0] == 285
    assert source.report["preference"].counts == {
        "duplicate of an earlier row": 19,
        "`output_1` and `output_2` are identical": 3,
    }
    assert source.report["preference_validation"].counts == {"duplicate of an earlier row": 5}
    whole = composed_data("alpaca", f"data.root={real}", "data.sft=alpaca/alpaca_11k.jsonl.gz")
    assert len(whole.load("sft")) == 11_221
    assert sum(whole.report["sft"].read.values()) == 11_225
    farm = composed_data(
        "alpaca",
        f"data.root={real}",
        "data.preference=alpaca_farm/simengsun_auto_annotations_test.json.gz",
        "data.eval=alpaca_eval/text_davinci_003_model_outputs.json.gz",
        "data.sft=alpaca_eval/eval_instructions.jsonl.gz",
    )
    assert len(farm.load("preference")) == 523 - 49  # these two outputs are identical
    assert (len(farm.load("eval")), farm.report["eval"].counts) == (803, {"empty `output`": 2})
    with pytest.raises(DataError, match=r"can be used \(205 × instruction is in the evaluation set\)"):
        farm.load("sft")
