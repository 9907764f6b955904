"""docs/data.md: its commands are run on files that fit them, and its YAML reads rows of the data sets it names."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf import root
from rlhf.data.column_maps import FIELDS, FORMATS
from rlhf.data.records import DataSource
from rlhf.pipeline.config import data_source
from rlhf.tracking.summary import read_summary
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.composed_config import composed_from
from tests.helpers.hub_rows import assistant, user

PAGE = (root() / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstrations.jsonl": [{"instruction": f"Add {i}.", "output": "x"} for i in range(40)],
    "preferences.jsonl": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)],
    "prompts.jsonl": [{"prompt": f"Which {i}?"} for i in range(40)],
    "ranked.jsonl": [{"query": f"{i}?", "best": "yes", "worst": "no"} for i in range(40)],
}
ULTRAFEEDBACK = {"source": "flan", "instruction": "Add 1 and 2.", "models": ["a", "b", "c", "d"], "completions": [
    {"model": name, "response": f"answer {name}", "overall_score": score, "fine-grained_score": 3.0}
    for name, score in zip("abcd", (7.5, 3.0, 7.0, 7.5), strict=True)
]}  # fmt: skip
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: I see.",
      "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: I do not."}  # fmt: skip
PANDALM = {"idx": 0, "motivation_app": "x", "cmp_key": "a_b", "instruction": "Add.", "input": "1 2", "response1": "3",
           "response2": "4", "annotator1": 1, "annotator2": 0, "annotator3": 1}  # fmt: skip
LLMBAR = {"input": "Add 1 and 2.", "output_1": "4", "output_2": "3", "label": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the page's YAML and the files that its commands name."""
    monkeypatch.chdir(tmp_path)
    for kind, text in BLOCKS:
        if kind == "yaml":
            path = tmp_path / text.partition("\n")[0].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for name, rows in ROWS.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_of_the_page_is_understood(command: list[str], capsys: pytest.CaptureFixture) -> None:
    few = [f"{stage}.{size}" for stage in ("sft", "reward") for size in ("validation_size=5", "batch_size=4")]
    assert run_in_process(*command, "debug=quick", *few) == 0
    assert "done: false" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reward_model_learns_from_scored_conversations(folder: Path) -> None:
    scored = [
        {"chosen": [user(f"{i}?"), assistant("yes")], "rejected": [user(f"{i}?"), assistant("no")],
         "score_chosen": 2 + i % 2 * 4, "score_rejected": 1}
        for i in range(40)
    ]  # fmt: skip
    for name, rows in (("scored", scored), ("known", scored[:10])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"chosen": "x"}]))
    tiny = [word for word in TINY if not word.startswith("data")]
    files = ["data.sft=demonstrations.jsonl", "data.preference=scored.jsonl", "data.preference_validation=known.jsonl"]
    assert run_in_process(*tiny, "data=hub", "data/template=short", *files, "stage=reward") == 0
    (summary,) = [read_summary(path.parent) for path in folder.glob("outputs/**/reward-*/summary.json")]
    assert {kind: row["pairs"] for kind, row in summary["by_kind"].items()} == {
        "margin up to 1": 5,
        "margin above 1": 5,
    }
    assert summary["rows"] == {"preference": 40}
    assert summary["skipped"]["no `rejected`"] == 1


def option(name: str, split: str, row: dict[str, Any]) -> DataSource:
    """An option of the page, whose split is read from a file with this row."""
    Path("row.jsonl").write_text(json.dumps(row) + "\n")
    others = [f"data.{other}=null" for other in ("sft", "preference", "preference_validation", "prompts")]
    config = composed_from(Path("mine/conf"), f"data={name}", *others, "data.held_out=null", f"data.{split}=row.jsonl",
                           "data/template=short")  # fmt: skip
    return data_source(config)


@pytest.mark.parametrize(
    ("name", "split", "row", "records"),
    [
        ("ultrafeedback", "sft", ULTRAFEEDBACK, {("answer a",)}),
        ("ultrafeedback", "preference", ULTRAFEEDBACK,
         {("answer a", "answer b"), ("answer c", "answer b"), ("answer d", "answer b")}),
        ("hh_rlhf", "preference", HH, {(" I see.", " I do not.")}),
        ("hh_rlhf", "sft", HH, {(" I see.",)}),
        ("pandalm", "preference_validation", PANDALM, {("3", "4")}),
        ("llmbar", "preference_validation", LLMBAR, {("3", "4")}),
    ],
)  # fmt: skip
def test_an_option_of_the_page_reads_rows_of_its_data_set(
    name: str, split: Any, row: dict[str, Any], records: set[tuple[str, ...]]
) -> None:
    rows = option(name, split, row).load(split)
    fields = ["response"] if split == "sft" else ["chosen", "rejected"]
    assert {tuple(found[field] for field in fields) for found in rows.to_list()} == records


def test_hh_rlhf_verbatim_ends_its_prompt_where_the_assistant_speaks() -> None:
    rows = option("hh_rlhf", "prompts", HH).load("prompts")
    assert rows["prompt"] == [HH["chosen"].removesuffix(" I see.")]


def test_the_page_names_all_fields_and_formats() -> None:
    columns = PAGE.partition("## Formats")[2].partition("## Other names")[0]
    for field, names in FIELDS.items():
        assert f"`{field}`" in columns
        assert all(f"`{name}`" in columns for name in names)
    listed = [line.split("|")[1].partition(",")[0].strip() for line in columns.splitlines() if line.startswith("| ")]
    assert listed[-len(FORMATS) :] == [" + ".join(needed) for needed, _ in FORMATS.values()]


def test_the_page_lists_every_key_of_the_hub_with_its_default() -> None:
    """Defaults and keys of conf/data/hub.yaml; splits share a line."""
    listed: dict[str, str] = {}
    for names, default in re.findall(
        r"^\| ((?:`\w+`(?:, )?)+) \| (.+?) \|", PAGE.partition("## All keys")[2], re.MULTILINE
    ):
        listed |= dict.fromkeys(re.findall(r"`(\w+)`", names), default)
    config = OmegaConf.load(root() / "conf" / "data" / "hub.yaml")
    keys = {str(key) for key in config} - {"defaults", "_target_"}
    assert set(listed) == keys | {"template"}
    for key in keys:
        assert OmegaConf.create({"x": config[key]}).x == OmegaConf.create(f"x: {listed[key].strip('`')}").x, key
