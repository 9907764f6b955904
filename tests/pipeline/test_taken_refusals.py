"""Checkpoints that cannot take the place of a training: each is refused in one sentence before anything is made."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import rlhf.models.released
from rlhf.errors import ConfigError
from rlhf.pipeline.preflight import work_of
from rlhf.pipeline.taken import taken_of
from tests.helpers.composed_config import compose_and_check, composed_plan
from tests.helpers.released_models import COMMIT, on_the_hub, random_model, released, with_released_shape
from tests.helpers.tiny_tokenizers import llama

BAD = [
    ("sft.from={none}", r"sft\.from=.*/nothing: there is no such folder; allowed: a folder, or HUB_ID\[@REVISION\]"),
    ("sft.from=me/nothing@main", r"sft\.from=me/nothing@main: there is no such folder, and the Hub does not give it"),
    ("sft.from={empty}", r"has no config\.json; allowed: the folder or Hub id of a model"),
    ("sft.from={reward}", "is a reward model or classifier; allowed: a causal language model"),
    ("reward.from={sft}", "is a language model; allowed: a sequence classifier with one output"),
    ("reward.from={adapter}", "is a language model; allowed: a sequence classifier with one output"),
    ("reward.from={two}", "has 2 outputs; allowed: a sequence classifier with one"),
    ("sft.from={wide}", r"has hidden_size=64 \(model=custom: 48\); allowed: a model of the same shape"),
    ("sft.from={words}", "has another vocabulary than the tokenizer of model=custom"),
    ("sft.from={encoder}", "is a BertForMaskedLM; allowed: a causal language model"),
    ("sft.from={sft}-wdiff", r"holds weight differences; allowed: with sft\.difference_to="),
    ("sft.difference_to={sft}", r"there are none; allowed: with sft\.from"),
    ("reward.model=me/model", r"reward\.model=me/model names no option; allowed: model@reward\.model=custom, "),
    ("reward.from={untold}", "has no tokenizer to read texts with"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("released")
    made = released(folder)
    tokenizer = AutoTokenizer.from_pretrained(made.sft)
    made.none, made.empty = folder / "nothing", folder / "empty"
    made.empty.mkdir()
    made.wide, made.words, made.two = folder / "wide", folder / "words", folder / "two"
    random_model(AutoModelForCausalLM, len(tokenizer), 64).save_pretrained(made.wide)
    random_model(AutoModelForCausalLM, 400).save_pretrained(made.words)
    llama().save_pretrained(made.words)
    random_model(AutoModelForSequenceClassification, len(tokenizer)).save_pretrained(made.two)
    made.encoder, made.untold = folder / "encoder", folder / "untold"
    made.encoder.mkdir()
    (made.encoder / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 99})
    )
    random_model(AutoModelForSequenceClassification, 99, 32, num_labels=1).save_pretrained(made.untold)
    shutil.copytree(made.sft, f"{made.sft}-wdiff")
    return made


@pytest.mark.parametrize(("override", "message"), BAD)
def test_what_does_not_fit_is_refused_in_one_sentence(made: SimpleNamespace, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        compose_and_check(*with_released_shape(made), override.format(**vars(made)))
    assert "\n" not in str(error.value)
    compose_and_check(*with_released_shape(made), f"sft.from={made.sft}", f"reward.from={made.reward}")


def test_a_reward_model_is_taken_or_trained_on_another_model_not_both(made: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"reward\.from=.* is not trained here, and model@reward\.model=tiny"):
        compose_and_check(*with_released_shape(made), f"reward.from={made.reward}", "model@reward.model=tiny")


def test_a_model_of_the_hub_counts_by_its_commit(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_cache = partial(rlhf.models.released.snapshot_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(rlhf.models.released, "snapshot_download", in_cache)
    on_the_hub(made.sft, "me/sft", tmp_path / "hub")
    words = with_released_shape(made)
    plans = [composed_plan(tmp_path, *words, f"sft.from=me/sft{revision}") for revision in ("", "@main", f"@{COMMIT}")]
    assert plans[0].taken["sft"].described == f"taken from me/sft at {COMMIT[:12]}"
    assert plans[0].taken["sft"].identity(None)["from"] == f"me/sft@{COMMIT}"
    assert len({plan.sft_folder for plan in plans}) == 1
    assert len({plan.identity for plan in plans}) == 1
    assert composed_plan(tmp_path, *words, f"sft.from={made.sft}").sft_folder != plans[0].sft_folder


def test_a_checkpoint_counts_by_its_content_and_the_keys_of_its_training_do_not(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    words = with_released_shape(made)
    plan = composed_plan(tmp_path, *words, f"sft.from={made.sft}", f"reward.from={made.reward}")
    copied = tmp_path / "copied"
    shutil.copytree(made.sft, copied)
    same = [f"sft.from={copied}", f"reward.from={made.reward}", "sft.lr=0.1", "reward.lr=0.1", "sft.seed=3"]
    again = composed_plan(tmp_path, *words, *same)
    assert (again.sft_folder, again.reward_folder, again.identity) == (
        plan.sft_folder, plan.reward_folder, plan.identity
    )  # fmt: skip
    changed = copied / "generation_config.json"
    changed.write_text(changed.read_text() + "\n")
    assert composed_plan(tmp_path, *words, *same).identity != plan.identity


def test_the_estimate_counts_a_whole_reward_model(made: SimpleNamespace, tmp_path: Path) -> None:
    words = with_released_shape(made)
    role = composed_plan(tmp_path, *words, f"sft.from={made.sft}", f"reward.from={made.reward}")
    assert taken_of(role.settings, role.source)["reward"].reads == "ids"
    work = work_of(role, unmade=True)
    assert work.stages == ("taken", "taken", "ppo")
    assert (work.reward_model, work.beside) == (True, 0)
    scorer = composed_plan(tmp_path, *words, f"reward.from={made.foreign}")
    model = AutoModelForSequenceClassification.from_pretrained(made.foreign, num_labels=1)
    work = work_of(scorer, unmade=True)
    assert work.stages == ("sft", "ppo")
    assert work.reward_model is False
    assert work.beside == 4 * sum(parameter.numel() for parameter in model.parameters())
    other = composed_plan(tmp_path, *words, "model@reward.model=tiny")
    assert work_of(other, unmade=True).stages == ("sft", "ppo")
    assert work_of(other, unmade=True).beside > 0
