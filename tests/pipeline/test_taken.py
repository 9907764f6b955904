"""`sft.from`, `reward.from` and `reward.model`: runs on checkpoints that others trained, or that exist already."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import ConfigError
from rlhf.files import METRICS, read_lines
from rlhf.finished.export import cli as export
from tests.helpers.command_line import TINY, error_sentence, run_in_process
from tests.helpers.composed_config import compose_and_check, composed_plan
from tests.helpers.released_models import released, weight_difference, with_released_shape

pytestmark = pytest.mark.slow
TRAINING = ("training the SFT model", "training the reward model")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return released(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def differences(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return weight_difference(made, tmp_path_factory.mktemp("wdiff"), AutoTokenizer.from_pretrained(made.sft))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(name: str) -> Path:
    """The folder of the only run of this name."""
    (summary,) = Path("outputs", name).glob("*/summary.json")
    return summary.parent


def cached(product: str) -> Path:
    (folder,) = (path.parent for path in Path("outputs/cache").glob(f"{product}-*/summary.json"))
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def measured(folder: Path) -> list[dict[str, Any]]:
    """All metrics but those of time."""
    timed = ("time", "rollouts_per_second", "memory")
    return [
        {key: value for key, value in line.items() if not any(word in key for word in timed)}
        for line in read_lines(folder / METRICS)
    ]


def said(capfd: Any) -> str:
    """What the runs since the last call have said, in one line."""
    captured = capfd.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


def test_ppo_on_released_models_trains_neither_and_is_exported(made: SimpleNamespace, capfd: Any) -> None:
    words = [*with_released_shape(made), f"sft.from={made.sft}", f"reward.from={made.reward}"]
    assert run_in_process(*words, "name=ppo") == 0
    told = said(capfd)
    assert not [text for text in TRAINING if text in told]
    assert "2 model(s) in memory (base, reward)" in told
    kept = load_file(cached("sft") / "model/model.safetensors")
    original = load_file(made.sft / "model.safetensors")
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in original)
    reward = summary_of(cached("reward"))
    assert reward["taken_from"]["name"] == str(made.reward)
    assert {"reward/baseline", "reward/accuracy"} <= reward["metrics"].keys()
    assert summary_of(done("ppo"))["reward_model"] == cached("reward").name
    # export: the policy and the taken reward model
    export.main([str(done("ppo")), "policy"])
    AutoModelForCausalLM.from_pretrained("policy")
    export.main([str(cached("reward")), "exported"])
    theirs, ours = (
        AutoModelForSequenceClassification.from_pretrained(place, num_labels=1) for place in (made.reward, "exported")
    )
    ids = torch.arange(3, 9)[None]
    assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_each_stage_takes_instead_of_training(made: SimpleNamespace, capfd: Any) -> None:
    words = [*with_released_shape(made), f"sft.from={made.adapter}", f"reward.from={made.reward}"]
    assert run_in_process(*words, "stage=sft", "name=sft") == 0
    assert run_in_process(*words, "stage=reward", "name=reward") == 0
    assert run_in_process(*words, "stage=evaluate", "name=evaluate") == 0
    told = said(capfd)
    assert told.count("taking ") == 2
    assert not [text for text in TRAINING if text in told]
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.sft), made.adapter).merge_and_unload()
    taken = AutoModelForCausalLM.from_pretrained(done("sft") / "model")
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(taken(ids).logits, merged(ids).logits)
    before = AutoModelForCausalLM.from_pretrained(made.sft)(ids).logits
    assert (before - taken(ids).logits).abs().max() > 1e-3


def test_models_of_the_cache_make_the_same_run_and_copies_the_same_bits(capfd: Any) -> None:
    words = [*TINY, "lora@reward.lora=none"]
    assert run_in_process(*words, "name=trained") == 0
    sft, reward = cached("sft"), cached("reward")
    assert run_in_process(*words, f"sft.from={sft}", f"reward.from={reward}", "name=taken") == 0
    plans = [
        composed_plan(Path("outputs"), *words, f"reward.from={reward}", *more)
        for more in ([], ["data.demonstrations=99"], ["reward.baseline_rows=3"])
    ]
    assert [plan.in_place("reward") for plan in plans] == [reward.resolve(), None, None]  # another baseline
    same = summary_of(done("taken"))
    assert same["identity"] == summary_of(done("trained"))["identity"]
    assert same["same_as"]
    for folder in (sft, reward):
        shutil.copytree(folder, folder.name)
    assert run_in_process(*words, f"sft.from={sft.name}", f"reward.from={reward.name}/model", "name=copied") == 0
    told = said(capfd)
    assert told.count("training the SFT model") == 1
    assert "same_as" not in summary_of(done("copied"))
    assert measured(done("copied")) == measured(done("trained"))
    policies = [load_file(done(name) / "model/adapter_model.safetensors") for name in ("trained", "copied")]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])


def test_a_reward_model_with_another_tokenizer_is_a_scorer(made: SimpleNamespace, capfd: Any) -> None:
    words = [*with_released_shape(made), f"sft.from={made.sft}", f"reward.from={made.foreign}"]
    assert run_in_process(*words, "name=ppo", "judge=reward_model") == 0
    told = said(capfd)
    assert "1 model(s) in memory (base)" in told  # the value function starts from the SFT model
    with pytest.raises(ConfigError, match=r"judge\.folder=.* is a classifier .*; allowed: judge=reward_model with"):
        compose_and_check(*words, "judge=finished_reward_model", f"judge.folder={cached('reward')}")
    baseline = summary_of(cached("reward"))["metrics"]["reward/baseline"]
    rows = [row for row in read_lines(done("ppo") / "samples.jsonl") if row["step"] == 0]
    model = AutoModelForSequenceClassification.from_pretrained(made.foreign, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(made.foreign)
    for row in rows:
        ids = tokenizer(row["prompt"] + row["response"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert row["reward"] == pytest.approx(float(model(ids).logits) - baseline, abs=1e-4)


def test_a_finished_run_is_measured_when_its_checkpoints_are_gone(made: SimpleNamespace, capfd: Any) -> None:
    for name in ("sft", "foreign"):
        shutil.copytree(vars(made)[name], name)
    words = [*with_released_shape(made), "sft.from=sft/", "reward.from=foreign/", "name=ppo"]
    assert run_in_process(*words) == 0
    for name in ("sft", "foreign"):
        shutil.rmtree(name)
    assert run_in_process("stage=evaluate", f"policy={done('ppo')}", "judge=reward_model", "name=again") == 0
    told = said(capfd)
    assert not [text for text in TRAINING if text in told]
    assert summary_of(done("again"))["metrics"]["eval/reward"] == summary_of(done("ppo"))["metrics"]["eval/reward"]


def test_a_reward_model_of_another_size_is_trained_on_its_own_sft_model(capfd: Any) -> None:
    size = ["model@reward.model=tiny", "reward.model.config.hidden_size=48", "reward.model.config.num_hidden_layers=1"]
    assert run_in_process(*TINY, *size, "name=ppo") == 0
    told = said(capfd)
    assert told.count("training the SFT model") == 2
    assert "1 model(s) in memory (base)" in told
    reward = cached("reward")
    config = json.loads((reward / "model/adapter_config.json").read_text())
    own = json.loads((Path(config["base_model_name_or_path"]) / "config.json").read_text())
    assert own["hidden_size"] == 48
    assert summary_of(done("ppo"))["reward_model"] == reward.name
    # the same model as the policy's, named apart, is the same reward model
    assert run_in_process(*TINY, "stage=reward", "name=own") == 0
    shape = [word.replace("model.", "reward.model.") for word in TINY if word.startswith("model.config")]
    assert run_in_process(*TINY, "model@reward.model=tiny", *shape, "stage=reward", "name=named") == 0
    assert said(capfd).count("training the reward model") == 1


def test_weight_differences_become_the_models_they_were_made_from(
    made: SimpleNamespace, differences: SimpleNamespace, capfd: Any
) -> None:
    words = [*with_released_shape(made), f"sft.from={differences.sft}", f"sft.difference_to={differences.base}",
             f"reward.from={differences.reward}", f"reward.difference_to={differences.base}"]  # fmt: skip
    assert run_in_process(*words, "name=ppo") == 0
    told = said(capfd)
    assert told.count("as published") == 2
    ids = torch.arange(3, 9)[None]
    tuned, recovered = (AutoModelForCausalLM.from_pretrained(place) for place in (made.sft, cached("sft") / "model"))
    torch.testing.assert_close(recovered(ids).logits, tuned(ids).logits, atol=1e-6, rtol=1e-5)
    theirs, ours = (
        AutoModelForSequenceClassification.from_pretrained(place, num_labels=1)
        for place in (made.reward, cached("reward") / "model")
    )
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-6, rtol=1e-5)
    assert summary_of(cached("reward"))["taken_from"]["bias"] == 0.5


def test_differences_to_another_base_are_refused_and_leave_nothing(
    made: SimpleNamespace, differences: SimpleNamespace, capfd: Any
) -> None:
    words = [*with_released_shape(made), f"sft.from={differences.sft}", f"sft.difference_to={made.sft}"]
    assert run_in_process(*words, "name=ppo") == 2
    assert "the weights add up to" in error_sentence(capfd.readouterr().err)
    assert not list(Path("outputs/cache").glob("sft-*/summary.json"))
    assert not list(Path("outputs").rglob("*.safetensors"))


def test_a_dry_run_says_what_is_taken(made: SimpleNamespace, capfd: Any) -> None:
    words = [*with_released_shape(made), f"sft.from={made.sft}", f"reward.from={made.foreign}"]
    assert run_in_process(*words, "dry_run=true") == 0
    told = said(capfd)
    assert f"sft: taken from {made.sft} " in told
    assert f"reward: taken from {made.foreign}, as a scorer with its own tokenizer" in told
    assert not Path("outputs/cache/runs").exists()
