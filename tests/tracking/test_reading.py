"""Run folders that an earlier version left are reported on, compared and opened under the present names."""

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from rlhf.errors.keys import RENAMED
from rlhf.files import SUMMARY, write_json
from rlhf.finished.run import FinishedRun
from rlhf.pipeline import earlier
from rlhf.report.runs import load
from rlhf.tracking.reading import RENAMED_TARGETS, renamed_config, renamed_overrides, try_plan
from tests.helpers.composed_config import composed

PRESENT_CONFIG: dict[str, Any] = {
    "seed": 2,
    "variant": "lora_kl",
    "model": {"name": "tiny", "dtype": "float32", "attn_implementation": "eager", "max_prompt_tokens": 32},
    "reward": {"lr": 0.1, "baseline_rows": 256},
    "ppo": {"value_model": "adapter", "reference_every": 10, "value_coef": 0.1},
    "guards": {"spike": {"action": "warn", "window": 10, "limit": 10.0}},
    "scorer": {"terms": [{"scorer": {"_target_": "rlhf.scorers.classifier.ClassifierScorer", "attention": "kept"}}]},
    "logger": {"_target_": "rlhf.tracking.dashboards.wandb_logger"},
    "report": {
        "title": "arm=a wrestling",
        "baseline": "variant=lora_kl",
        "labels": {"variant=lora_kl": "KL", "lora_none": "none", "variant=a, ppo.reference_every=1": "both"},
        "figures": [{"name": "curve", "y": "eval/win_rate", "kind": "curve", "rows": ["variant=lora_kl"]}],
    },
}
OLD_CONFIG: dict[str, Any] = {
    "seed": 1,
    "arm": "lora_kl",
    "model": {"name": "tiny", "dtype": "float32", "attention": "eager", "max_prompt_tokens": 32},
    "reward": {"lr": 0.1, "centre_on": 256},
    "ppo": {"value": "adapter", "yardstick_every": 10, "value_coef": 0.1},
    "guards": {"spike": {"action": "warn", "over": 10, "limit": 10.0}},
    "scorer": {"terms": [{"scorer": {"_target_": "rlhf.scorers.sentiment.SentimentScorer", "attention": "kept"}}]},
    "logger": {"_target_": "rlhf.tracking.wandb_logger"},
    "report": {
        "title": "arm=a wrestling",
        "baseline": "arm=lora_kl",
        "labels": {"arm=lora_kl": "KL", "lora_none": "none", "arm=a, ppo.yardstick_every=1": "both"},
        "figures": [{"name": "curve", "y": "eval/win_rate", "kind": "curve", "rows": ["arm=lora_kl"]}],
    },
}


def write_summary(folder: Path, config: dict[str, Any], overrides: list[str], **more: Any) -> None:
    folder.mkdir(parents=True)
    summary = {
        "stage": "ppo",
        "metrics": {"eval/win_rate": 0.5},
        "git_commit": "abc",
        "config": config,
        "overrides": overrides,
    }
    write_json(folder / SUMMARY, {**summary, **more})


def test_an_old_configuration_gets_the_present_names() -> None:
    assert renamed_config(OLD_CONFIG) == {**PRESENT_CONFIG, "seed": 1}
    assert renamed_config(PRESENT_CONFIG) == PRESENT_CONFIG


def test_old_overrides_get_the_present_names() -> None:
    old = ["arm=lora_kl", "+ppo.yardstick_every=5", "guards.spike.over=3", "seed=1", "~arm", "ppo.value_coef=0.2"]
    new = ["variant=lora_kl", "+ppo.reference_every=5", "guards.spike.window=3", "seed=1", "~variant"]
    assert renamed_overrides(old) == [*new, "ppo.value_coef=0.2"]
    assert renamed_overrides(["logger._target_=rlhf.tracking.wandb_logger"]) == [
        "logger._target_=rlhf.tracking.dashboards.wandb_logger"
    ]


def test_the_present_names_exist() -> None:
    config = composed()
    for old, new in RENAMED.items():
        name = new.rpartition(".")[2]
        parent = old.replace("*", "spike").rpartition(".")[0]
        assert name == "variant" or name in (OmegaConf.select(config, parent) if parent else config)
        assert OmegaConf.select(config, old.replace("*", "spike"), default=None) is None
    for present in RENAMED_TARGETS.values():
        assert callable(hydra.utils.get_object(present))


# every path of a class that a configuration in this repository's history has named, and that has moved since
MOVED = [
    ("rlhf.distributed.collectives.Sharded", "rlhf.distributed.strategies.Sharded"),
    ("rlhf.parallel.DataParallel", "rlhf.distributed.strategies.DataParallel"),
    ("rlhf.scorers.bag_of_words.BagOfWordsScorer", "rlhf.scorers.ngrams.NgramScorer"),
    ("rlhf.scorers.sentiment.ClassifierScorer", "rlhf.scorers.classifier.ClassifierScorer"),
    ("rlhf.tracking.run_log.wandb_logger", "rlhf.tracking.dashboards.wandb_logger"),
]


@pytest.mark.parametrize(("old", "new"), MOVED)
def test_a_class_that_moved_does_not_part_the_seeds_of_a_row(tmp_path: Path, old: str, new: str) -> None:
    for seed, target in ((1, old), (2, new)):
        write_summary(tmp_path / f"s/{seed}", {"seed": seed, "scorer": {"_target_": target}}, ["a=1", f"seed={seed}"])
    sweep = load([tmp_path / "s"])
    assert sweep.unlike == ()
    assert [run.config["scorer"]["_target_"] for run in sweep.finished] == [new, new]


def test_old_and_new_runs_are_seeds_of_one_row(tmp_path: Path) -> None:
    """Even when both were made by the same commit, so that a key found in only one of them would count."""
    write_summary(tmp_path / "s/a", OLD_CONFIG, ["arm=lora_kl", "seed=1"])
    write_summary(tmp_path / "s/b", PRESENT_CONFIG, ["variant=lora_kl", "seed=2"])
    sweep = load([tmp_path / "s"])
    assert sweep.unlike == ()
    assert [(row.label, [run.seeds.ppo for run in row.runs]) for row in sweep.trained] == [("KL", [1, 2])]


def test_an_old_plan_and_failure_belong_to_the_present_rows(tmp_path: Path) -> None:
    write_summary(tmp_path / "s/a", OLD_CONFIG, [])
    (tmp_path / "s/b").mkdir()
    write_json(tmp_path / "s/b/failed.json", {"error": "out of memory", "overrides": ["arm=lora_none"]})
    runs = [{"folder": name, "overrides": [f"arm={name}", "seed=1"]} for name in "abc"]
    write_json(tmp_path / "s/plan.json", {"runs": runs})
    assert try_plan(tmp_path / "s/plan.json")[0][0]["overrides"] == ["variant=a", "seed=1"]
    keys = {run.name: (run.state, run.key) for run in load([tmp_path / "s"]).runs}
    assert keys == {
        "a": ("finished", ("variant=a",)),
        "b": ("failed", ("variant=lora_none",)),
        "c": ("missing", ("variant=c",)),
    }


def test_the_model_of_an_old_run_is_opened(tmp_path: Path) -> None:
    """The schema of `model` is strict: an earlier name would be an error."""
    write_summary(tmp_path / "run", OLD_CONFIG, [])
    (tmp_path / "run/model").mkdir()
    run = FinishedRun.open(tmp_path / "run")
    assert run.settings.attn_implementation == "eager"
    assert json.loads((tmp_path / "run" / SUMMARY).read_text())["config"] == OLD_CONFIG, "the file stays as it was"


@pytest.mark.parametrize("config", [OLD_CONFIG, PRESENT_CONFIG])
def test_renamed_keys_are_no_difference_to_an_earlier_run(config: dict[str, Any], tmp_path: Path) -> None:
    write_summary(tmp_path / "run", config, [])
    assert earlier.differences(tmp_path / "run", PRESENT_CONFIG, ignored=["seed"]) == []
