"""A setting chosen by a rule: the largest within a limit, whatever comes after the first that is beyond it."""

import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import MISTAKE, FigureError
from rlhf.report.cli import main, make_report
from rlhf.report.runs import load
from rlhf.report.tables import Table
from rlhf.report.tuning import _left_out, tuning_table
from tests.helpers.made_up_sweeps import write_run

RULE = {"key": "ppo.lr", "metric": "eval/true_kl", "limit": 0.16}
KL = {
    # at 1e-3 a lucky run is within the limit again, but 3e-4 is beyond it
    ("lora_none", "1e-4"): [0.02, 0.04], ("lora_none", "3e-4"): [0.1, 0.3], ("lora_none", "1e-3"): [0.1, 0.1],
    ("lora_kl", "1e-4"): [0.01], ("lora_kl", "3e-4"): [0.16], ("lora_kl", "1e-3"): [math.nan],
    ("full_none", "1e-4"): [0.2], ("full_none", "3e-4"): [0.9], ("full_none", "1e-3"): [2.0],
    ("full_kl", "1e-4"): [0.0], ("full_kl", "3e-4"): [0.0], ("full_kl", "1e-3"): [0.1],
}  # fmt: skip


def write(folder: Path, rule: Any = RULE) -> Path:
    layout = {"tuning": rule, "labels": {"lora_none": "LoRA, no penalty"}}
    for (variant, lr), values in reversed(KL.items()):  # not in ascending order
        for seed, value in enumerate(values, start=1):
            axes = [f"variant={variant}", f"ppo.lr={lr}", f"seed={seed}"]
            config = {"seed": seed, "ppo": {"lr": float(lr)}, "report": layout}
            metrics = {"eval/true_kl": value, "eval/win_rate": 0.4}
            write_run(folder / "_".join(axes), variant, seed, config=config, overrides=axes, metrics=metrics)
    return folder


def lines(table: Table | None) -> dict[str, list[str]]:
    assert table is not None
    return {str(name): [str(cell) for cell in rest] for name, *rest in table.rows}


def test_the_largest_value_within_the_limit_is_chosen(tmp_path: Path) -> None:
    assert lines(tuning_table(load([write(tmp_path / "s")]))) == {
        "LoRA, no penalty": ["1e-4", "0.030", "3e-4", "0.200"],
        "variant=lora_kl": ["3e-4", "0.160", "1e-3", "–"],
        "variant=full_none": ["–", "–", "1e-4", "0.200"],
        "variant=full_kl": ["1e-3", "0.100", "–", "–"],
    }


def test_the_best_value_is_chosen_and_by_replicates_that_are_not_counted(tmp_path: Path) -> None:
    rule = {"key": "ppo.lr", "metric": "eval/true_kl", "best": "max"}
    found = lines(tuning_table(load([write(tmp_path / "s", rule)])))
    assert found["LoRA, no penalty"] == ["3e-4", "0.200", "0.200", "no"]
    assert found["variant=lora_kl"] == ["3e-4", "0.160", "–", "no"]  # one replicate; 1e-3 diverged
    assert found["variant=full_none"] == ["1e-3", "2.000", "–", "yes"]
    fewer = lines(tuning_table(load([write(tmp_path / "t", {**rule, "best": "min"})])))
    assert fewer["LoRA, no penalty"] == ["1e-4", "0.030", "0.030", "yes"]
    # without the first, a is chosen (5 and 0), without the second b (a: 1 and 0), without the third a (1 and 5)
    assert _left_out({"a": [1, 5, 0], "b": [2, 2, 2]}, 1) == (1 + 2 + 0) / 3
    assert _left_out({"a": [1, 5, 0], "b": [2, 2]}, 1) is None
    with pytest.raises(FigureError, match="max or min"):
        tuning_table(load([write(tmp_path / "u", {**rule, "best": "most"})]))


def test_the_report_holds_the_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(write(tmp_path / "s"))])
    assert "next" in capsys.readouterr().out
    assert '"LoRA, no penalty",1e-4,' in (tmp_path / "s" / "report" / "tuning.csv").read_text()


def test_without_a_rule_or_its_key_there_is_no_choice(tmp_path: Path) -> None:
    assert tuning_table(load([write(tmp_path / "none", None)])) is None
    assert tuning_table(load([write(tmp_path / "other", RULE | {"key": "kl.coef"})])) is None


def test_an_incomplete_rule_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "s", {"key": "ppo.lr", "limit": 0.16})
    with pytest.raises(
        FigureError, match=r"report\.tuning=.*must have exactly key, limit, metric or best, key, metric"
    ):
        make_report([folder])
    with pytest.raises(SystemExit) as stop:
        main([str(folder)])
    assert stop.value.code == MISTAKE
    assert "report.tuning" in capsys.readouterr().err
