"""AlpacaFarm's data sets, from a local copy and by their name on the Hub."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from rlhf.data import sources
from rlhf.data.sources import Source
from rlhf.errors import DataError
from tests.helpers.composed_config import composed_data

ROOT = Path(__file__).parents[2]
HUB = "hf://datasets/tatsu-lab/alpaca_farm"
FILES = {
    "sft": "alpaca_instructions/sft.json",
    "sft_validation": "alpaca_instructions/val.json",
    "preference": "alpaca_human_preference.json",
    "prompts": "alpaca_instructions/unlabeled.json",
    "eval": "alpaca_farm_evaluation.json",
}


def copy(root: Path, **rows: list[dict[str, Any]]) -> Path:
    """Write a folder with the layout and fields of AlpacaFarm's repository."""
    demonstration = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    comparison = {"instruction": "Say hi.", "input": "", "output_1": "hi", "output_2": "no", "preference": 1}
    held_out = {
        "dataset": "koala",
        "instruction": "Sing.",
        "input": "",
        "output": "la",
        "generator": "text_davinci_003",
    }
    default = {"preference": [comparison | {"raw_preference": 2}], "eval": [held_out]}
    (root / "alpaca_instructions").mkdir(exist_ok=True)
    for split, file in FILES.items():
        (root / file).write_text(json.dumps(rows.get(split, default.get(split, demonstration))))
    return root


def test_a_local_copy_has_all_splits(tmp_path):
    data = composed_data("alpaca_farm", f"data.root={copy(tmp_path)}")
    data.check()
    assert set(data.splits) == set(FILES)
    prompt = data.load("sft")["prompt"][0]
    assert prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert data.load("prompts")["prompt"] == data.load("sft_validation")["prompt"] == [prompt]
    assert data.load("preference").select_columns(["chosen", "rejected"]).to_list() == [
        {"chosen": "hi", "rejected": "no"}
    ]
    assert data.load("eval")["reference_output"] == ["la"]
    assert "### Input" not in data.load("eval")["prompt"][0]


def test_other_preference_files_can_be_chosen_by_name(tmp_path):
    copy(tmp_path)
    os.rename(tmp_path / FILES["preference"], tmp_path / "alpaca_noisy_multi_preference.json")
    data = composed_data("alpaca_farm", f"data.root={tmp_path}", "data.preference=alpaca_noisy_multi_preference.json")
    assert len(data.load("preference")) == 1


def test_evaluation_instructions_are_never_trained_on(tmp_path):
    rows = [{"instruction": name, "input": "", "output": "x"} for name in ("Sing.", "Dance.")]
    data = composed_data("alpaca_farm", f"data.root={copy(tmp_path, sft=rows, prompts=rows)}")
    for split in ("sft", "prompts"):
        assert len(data.load(split)) == 1
        assert data.report[split].counts == {"instruction is in the evaluation set": 1}


def test_a_missing_file_of_a_copy_is_named_at_once(tmp_path):
    (copy(tmp_path) / FILES["eval"]).unlink()
    with pytest.raises(DataError, match=r"^data\.eval: .*/alpaca_farm_evaluation\.json does not exist"):
        composed_data("alpaca_farm", f"data.root={tmp_path}").check()


def test_the_hub_s_files_are_asked_for_by_name(tmp_path, monkeypatch):
    """Let `load_dataset` read a local copy instead of the Hub: the same arguments with another root."""
    copy(tmp_path)
    asked = []

    def load(path: str, *, data_files: str, split: str) -> datasets.Dataset:
        asked.append(data_files)
        return datasets.load_dataset(path, data_files=data_files.replace(HUB, str(tmp_path)), split=split)

    monkeypatch.setattr(sources, "load_dataset", load)
    data = composed_data("alpaca_farm")
    data.check()
    assert all(len(data.load(split)) == 1 for split in data.splits)
    assert set(asked) == {f"{HUB}/{file}" for file in FILES.values()}


def test_without_a_hub_the_failure_is_one_sentence(monkeypatch):
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hugging Face Hub\nTraceback …")

    monkeypatch.setattr(sources, "load_dataset", load)
    with pytest.raises(DataError) as failure:
        composed_data("alpaca_farm").load("eval")
    assert str(failure.value) == (
        f"{HUB}/alpaca_farm_evaluation.json cannot be loaded (ConnectionError: Couldn't reach the Hugging Face Hub)"
    )


@pytest.mark.parametrize(
    ("spec", "root", "builder", "url"),
    [
        ("a/b.jsonl.gz", Path("hf://datasets/o/n"), "json", "hf://datasets/o/n/a/b.jsonl.gz"),
        ("hf://datasets/o/n@main/b.parquet", Path("."), "parquet", "hf://datasets/o/n@main/b.parquet"),
        ("hf://datasets/o/n/b.csv", Path("/data"), "csv", "hf://datasets/o/n/b.csv"),
        ("hf://datasets/o/n/b.csv", Path("hf://datasets/x/y"), "csv", "hf://datasets/o/n/b.csv"),
    ],
)
def test_files_on_the_hub_are_loaded(spec, root, builder, url):
    source = Source.parse(f"{spec}[2:5]", root)
    assert source == Source(f"{url}[2:5]", None, {"path": builder, "data_files": url}, 2, 5)


@pytest.mark.parametrize("spec", ["/data/a.json", "owner/name:config:split"])
def test_a_root_on_the_hub_leaves_other_sources_as_they_are(spec):
    assert Source.parse(spec, Path(HUB)) == Source.parse(spec, Path("."))


@pytest.mark.real
@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA names no folder")
def test_the_real_evaluation_set_can_be_read(tmp_path):
    real = Path(os.environ["RLHF_REAL_DATA"], "alpaca_eval", "text_davinci_003_model_outputs.json.gz")
    copy(tmp_path, eval=json.loads(gzip.decompress(real.read_bytes())))
    data = composed_data("alpaca_farm", f"data.root={tmp_path}")
    assert len(data.load("eval")) == 803
    assert data.report["eval"].read == {"alpaca_farm_evaluation.json": 805}
    assert data.report["eval"].counts == {"empty `output`": 2}
