"""All rows that a run will read are looked at before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rlhf.data.farm import Farm
from rlhf.data.hub import Hub
from rlhf.data.records import Split, count_prompts, held_out_rows
from rlhf.errors import ConfigError, DataError
from rlhf.pipeline.rows import rows_of
from tests.helpers.command_line import TINY, error_sentence
from tests.helpers.composed_config import composed_data, composed_settings

OWN = [
    "data=hub", "data.sft=sft.jsonl", "data.preference=preference.jsonl", "data.prompts=prompts.jsonl", "judge=none",
    *(word for word in TINY if not word.startswith("data")),
]  # fmt: skip


def write(folder: Path, **splits: list[dict[str, Any]]) -> None:
    found = {
        "sft": [{"instruction": f"Add {i}.", "output": f"It is {i}."} for i in range(40)],
        "preference": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)],
        "prompts": [{"prompt": f"Which {i}?"} for i in range(40)],
        **splits,
    }
    for split, rows in found.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize(("rows", "held_out"), [(5000, 200), (1000, 200), (500, 100), (9, 1), (2, 1)])
def test_at_most_a_fifth_of_a_small_split_is_held_out(rows: int, held_out: int) -> None:
    assert held_out_rows(rows, "sft", "sft_validation", 200) == held_out


def test_a_single_row_is_too_few() -> None:
    with pytest.raises(DataError, match=r"^the split sft has 1 row, .* allowed: more rows"):
        held_out_rows(1, "sft", "sft_validation", 200)


def test_rows_and_steps_by_hand(tmp_path: Path) -> None:
    write(tmp_path, sft=[{"instruction": f"Add {i}.", "output": "x"} for i in range(499)] + [{"instruction": "y"}])
    source = composed_data("hub", f"data.root={tmp_path}", "data.sft=sft.jsonl")
    counts = {"sft": len(source.load("sft"))}
    settings = composed_settings("sft.epochs=2", "sft.batch_size=100", "sft.warmup_steps=8")
    rows = rows_of(settings, source, counts, "sft")  # type: ignore[arg-type]
    assert str(rows) == "400 rows to train on (8 steps of 100), 99 held out, 1 skipped"
    long = composed_settings("sft.epochs=2", "sft.batch_size=100", "sft.warmup_steps=9")
    with pytest.raises(ConfigError, match=r"^sft\.warmup_steps=9 is longer than the training: 400 rows make 8 steps"):
        rows_of(long, source, counts, "sft")  # type: ignore[arg-type]


def test_steps_count_the_prompts_whose_comparisons_are_trained_on_together() -> None:
    source = Farm(responses=4, comparisons=60)  # six pairs of the answers to each of ten prompts
    counts = {split: len(source.load(split)) for split in ("preference", "preference_validation")}
    grouped = composed_settings("reward=grouped", "reward.epochs=2", "reward.batch_size=4", "reward.warmup_steps=5")
    rows = rows_of(grouped, source, counts, "reward", count_prompts(source.load("preference")))
    assert str(rows) == "60 rows to train on (5 steps of 4 prompts), 500 held out"
    long = composed_settings("reward=grouped", "reward.epochs=2", "reward.batch_size=4", "reward.warmup_steps=6")
    with pytest.raises(ConfigError, match="longer than the training: 10 prompts make 5 steps"):
        rows_of(long, source, counts, "reward", count_prompts(source.load("preference")))


def test_no_model_is_trained_if_a_later_stage_cannot_read_its_rows(command: Callable, tmp_path: Path) -> None:
    write(tmp_path, preference=[{"prompt": "1?", "better": "yes", "worse": "no"}] * 40)
    code, out, err = command(*OWN)
    assert code == 2, out + err
    assert "preference.jsonl has the columns prompt, better, worse" in error_sentence(err)
    assert not Path("outputs").exists()


def test_no_model_is_trained_if_a_warmup_is_longer_than_its_stage(command: Callable, tmp_path: Path) -> None:
    write(tmp_path)
    code, out, err = command(*OWN, "reward.warmup_steps=9")
    assert code == 2, out + err
    assert "reward.warmup_steps=9 is longer than the training: 32 rows make 1 step" in error_sentence(err)
    assert not list(Path("outputs").glob("cache/*sft*"))


def test_a_dry_run_of_a_sweep_reads_the_rows_and_names_the_first_run_that_would_be_refused(
    command: Callable, tmp_path: Path
) -> None:
    write(tmp_path)
    code, out, err = command("-m", *OWN, "dry_run=true", "scorer=gold,reward_model")
    assert code == 2
    assert "allowed: scorer=reward_model, scorer=function, or another scorer" in error_sentence(err)
    code, out, err = command("-m", *OWN, "dry_run=true", "reward.warmup_steps=1,9")
    assert code == 2
    assert out.splitlines()[0].startswith("missing  ")
    assert "reward.warmup_steps=1 " in out.splitlines()[0]
    assert out.splitlines()[-1].startswith("refused  ")
    assert "reward.warmup_steps=9" in out.splitlines()[-1]
    assert len(out.splitlines()) == 2, "a run that would be refused is not called missing before"
    assert "reward.warmup_steps=9 is longer than the training: 32 rows make 1 step" in error_sentence(err)
    assert err.splitlines() == [error_sentence(err)], "no line of Hydra's, and no progress bar of another library"
    assert not Path("outputs/rlhf").exists()


def test_a_dry_run_reads_each_split_once(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that does not keep its rows, as a user's own may not, would read its files for each question."""
    read: list[str] = []
    load = Hub.load

    def counted(self: Hub, split: Split) -> Dataset:
        read.append(split)
        return load(self, split)

    write(tmp_path)
    monkeypatch.setattr(Hub, "load", counted)
    code, out, err = command(*OWN, "dry_run=true")
    assert code == 0, err
    assert "time: about " in out
    assert sorted(read) == ["preference", "prompts", "sft", "sft"]  # the tokenizer is trained on the demonstrations


@pytest.mark.slow
def test_a_dry_run_and_a_run_say_what_becomes_of_the_rows(command: Callable, tmp_path: Path) -> None:
    write(tmp_path)
    code, out, err = command(*OWN, "sft.epochs=2", "dry_run=true", "stage=sft")
    assert code == 0, err
    assert "rows: 32 rows to train on (7 steps of 10), 8 held out" in out
    code, out, err = command(*OWN, "sft.epochs=2", "stage=sft")
    assert code == 0, err
    assert "SFT: 32 rows to train on (7 steps of 10), 8 held out" in out
