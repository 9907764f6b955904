"""Identities of runs and cached models: what they depend on, and what they ignore."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.alpaca import Alpaca
from rlhf.data.farm import Farm
from rlhf.errors import ConfigError, DataError
from rlhf.pipeline import identity
from rlhf.pipeline.checks import check
from rlhf.pipeline.plan import Plan
from tests.helpers.composed_config import composed_plan

# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    return path


def test_a_file_counts_by_its_content(rows: Path, tmp_path: Path) -> None:
    config = {"data": {"root": str(tmp_path), "sft": "rows.jsonl[:5]"}}
    before = identity.digest(config)
    os.utime(rows, (1, 1))
    assert identity.digest(config) == before
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    rows.rename(moved / "rows.jsonl")
    assert identity.digest({"data": {"root": str(moved), "sft": "rows.jsonl[:5]"}}) == before
    assert identity.digest({"data": {"root": str(moved), "sft": "rows.jsonl[5:]"}}) != before
    stat = (moved / "rows.jsonl").stat()
    (moved / "rows.jsonl").write_text('{"a": 2}\n')
    os.utime(moved / "rows.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity.digest({"data": {"root": str(moved), "sft": "rows.jsonl[:5]"}}) != before


@pytest.mark.parametrize("name", ["mine.jinja", "mine"])
def test_the_files_of_a_prompt_template_are_not_below_the_root_of_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are read, from the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text("{{ messages }}")
    template = {"name_or_path": None, "chat_template": name}
    config = {"data": {"parts": {"a": {"root": str(tmp_path / "data"), "template": template}}}}
    before = identity.digest(config)
    (tmp_path / name).write_text("{{ messages[0] }}")
    assert identity.digest(config) != before


def test_option_values_are_not_taken_for_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has the same name as an option."""
    monkeypatch.chdir(tmp_path)
    config = {"generation": {"engine": "native"}, "sft": {"schedule": "linear"}}
    before = identity.digest(config)
    (tmp_path / "native").mkdir()
    (tmp_path / "linear").write_text("x")
    assert identity.digest(config) == before


def test_a_users_own_code_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_reward_code.py").write_text("def reward(prompts, responses): return 1")
    config = {"scorer": {"_target_": "rlhf.scorers.text.FunctionScorer", "function": "my_reward_code.reward"}}
    before = identity.digest(config)
    (tmp_path / "my_reward_code.py").write_text("def reward(prompts, responses): return 2")
    assert identity.digest(config) != before


# -- keys ------------------------------------------------------------------------------------------------------------


def test_the_model_behind_an_endpoint_counts_and_connection_settings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(**client: Any) -> Any:
        return identity.decisive({"judge": {"model": "m", "client": {"timeout": 1, **client}}})

    assert judged(base_url="http://a/v1") == judged(base_url="http://a/v1", timeout=2, cache="elsewhere", retries=0)
    assert judged(base_url="http://a/v1") != judged(base_url="http://b/v1")
    moved = [judged(base_url=url, name="llama") for url in ("http://a/v1", "http://b/v1")]
    assert moved[0] == moved[1] != judged(base_url="http://a/v1")
    before = judged()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://a/v1/")
    assert judged() == judged(base_url="http://a/v1") != before


def test_names_and_checkpoint_intervals_do_not_count() -> None:
    one = {"sft": {"lr": 1, "checkpoint_every": 5}, "model": {"name": "tiny"}}
    other = {"sft": {"lr": 1, "checkpoint_every": 50}, "model": {"name": "small"}}
    assert identity.decisive(one) == identity.decisive(other)


def test_keys_of_lightning_are_left_out_and_those_of_other_trainers_not() -> None:
    own = {"_target_": "lightning.Trainer", "accelerator": "cpu", "devices": 2}
    assert identity.of_trainer(own) == {}
    assert identity.of_trainer({"_target_": "mine.Trainer", "devices": 2, "slow": True}) == {
        "_target_": "mine.Trainer",
        "slow": True,
    }


def test_the_farm_says_which_keys_concern_which_splits() -> None:
    """A key that does not concern a split changes neither the split's rows nor its identity."""
    small = {"demonstrations": 6, "comparisons": 6, "prompts": 6, "eval_prompts": 6, "responses": 4}
    changed = {"demonstrations": 7, "comparisons": 7, "prompts": 7, "eval_prompts": 7,
               "label_noise": 0.9, "max_response_tokens": 3, "fame": 1.5, "responses": 3,
               "annotations": 2, "edit_annotations": 2, "held_out_comparisons": 7}  # fmt: skip
    assert Farm.concerns.keys() == changed.keys()
    before = {split: Farm(**small).load(split).to_list() for split in Farm.splits}
    for key, value in changed.items():
        other = Farm(**{**small, key: value})
        differ = {split for split in Farm.splits if other.load(split).to_list() != before[split]}
        assert differ <= set(Farm.concerns[key]), key


def test_alpacas_evaluation_concerns_what_it_excludes() -> None:
    template = {"with_input": "{instruction} {input}", "without_input": "{instruction}"}
    files = {"sft": "a.jsonl", "preference": "b.jsonl", "eval": "c.jsonl"}
    for excluded, others in ((True, {"sft", "preference", "prompts"}), (False, set())):
        source = Alpaca(template=template, exclude_eval_instructions=excluded, **files)
        assert set(source.concerns["eval"]) == {"eval", *others}
        assert source.concerns["preference"] == ("preference",)
        assert "preference" not in identity.of_data(files, source, ("sft", "sft_validation"))
        assert ("eval" in identity.of_data(files, source, ("sft",))) == excluded


# overrides, and which of SFT model, reward model and run they change
DECIDED = [
    ("ppo.steps=7", "run"),
    ("seed=1", "run"),
    ("replicate=1", "sft, reward, run"),
    ("replicate=1 seed=0", "sft, reward, run"),
    ("replicate=1 seed=0 sft.seed=0 reward.seed=0", ""),
    ("data.prompts=50", "run"),
    ("data.eval_prompts=50", ""),
    ("judge=reward_model judge.tie=0.5", ""),
    ("evaluation.prompts=50 evaluation.best_of=4 evaluation.temperature=1.0", ""),
    ("evaluation.samples=3", ""),
    ("ppo.eval_every=3", ""),
    ("ppo.keep_best=null", "run"),
    ("ppo.keep_best_mode=min", "run"),
    ("scorer=bag_of_words judge=gold", "run"),
    ("model.max_prompt_tokens=20", "run"),
    ("data.comparisons=50", "reward, run"),
    ("data.label_noise=0.1", "reward, run"),
    ("data.responses=4", "reward, run"),
    ("data.fame=0", "sft, reward, run"),
    ("reward.lr=0.5", "reward, run"),
    ("reward.average_of=3", "reward, run"),
    ("scorer=ensemble", "run"),
    ("data.demonstrations=50", "sft, reward, run"),
    ("data.seed=4", "sft, reward, run"),
    ("sft.seed=4", "sft, reward, run"),
    ("model.config.hidden_size=64", "sft, reward, run"),
    ("guards=off", "sft, reward, run"),  # non-finite values would be trained on
    ("+trainer.slow=1 trainer._target_=mine.Trainer", "sft, reward, run"),
    ("guards=strict", ""),
    ("trainer.devices=2", ""),
    ("trainer.accelerator=cpu", ""),
    ("ppo.checkpoint_every=3", ""),
    ("generation.cuda_graphs=never", ""),
    ("reward.log_every=3", ""),
    ("name=other", ""),
    ("logger=tensorboard", ""),
    ("resume=must", ""),
]


@pytest.mark.parametrize(("overrides", "expected"), DECIDED)
def test_a_key_changes_the_identities_that_depend_on_it(tmp_path: Path, overrides: str, expected: str) -> None:
    def names(run: Plan) -> dict[str, str]:
        return {"sft": run.sft_folder.name, "reward": run.reward_folder.name, "run": run.identity}

    before, after = names(composed_plan(tmp_path)), names(composed_plan(tmp_path, *overrides.split()))
    assert ", ".join(name for name in before if before[name] != after[name]) == expected


KEYS = ["limit_train_batches=1", "fast_dev_run=true", "overfit_batches=1", "max_time=00:00:01:00", "max_steps=3",
        "accumulate_grad_batches=2", "gradient_clip_val=1.0", "precision=bf16-mixed", "callbacks=[]"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_trainers_key_that_changes_training_is_refused(tmp_path: Path, key: str) -> None:
    run = composed_plan(tmp_path, f"+trainer.{key}")
    with pytest.raises(ConfigError, match=rf"^trainer\.{key.partition('=')[0]} .*; allowed: ") as refused:
        check(run.config, run.settings, run.source)
    assert "\n" not in str(refused.value)


def test_a_stage_needs_no_data_of_later_stages(tmp_path: Path) -> None:
    """SFT needs demonstrations only, although the default scorer would need comparisons."""
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    alone = ("data=alpaca", f"data.root={tmp_path}", "data.sft=rows.jsonl", "judge=reward_model", "model=custom",
             "model.name_or_path=a/b", *(f"data.{split}=null" for split in
             ("sft_validation", "preference", "preference_validation", "prompts", "eval")))  # fmt: skip
    run = composed_plan(tmp_path, "stage=sft", *alone)
    check(run.config, run.settings, run.source)
    run = composed_plan(tmp_path, "stage=ppo", *alone)
    with pytest.raises((ConfigError, DataError), match="no preference split"):
        check(run.config, run.settings, run.source)


# -- code ------------------------------------------------------------------------------------------------------------


def test_the_code_that_decides_a_model_is_what_makes_it() -> None:
    sft, reward, preferences = map(files_that_decide, ("sft", "reward", "preferences"))
    made_by = {
        "data",
        "distributed",
        "models",
        "guards",
        "stages",
        "pipeline",
        "policy_settings.py",
        "schema.py",
        "seeding.py",
        "settings.py",
    }
    assert top(sft) == top(reward) == made_by
    assert top(preferences) == made_by - {"guards", "stages"} | {"rollout", "evaluation", "scorers"}
    assert "stages/sft.py" in sft - reward
    assert "stages/reward.py" in reward - sft
    assert "stages/ppo.py" not in sft | reward | preferences


def files_that_decide(product: str) -> set[str]:
    files = identity.code_of(f"rlhf.pipeline.builders.{product}")
    return {str(file.relative_to(identity.PACKAGE)) for file in files}


def top(files: set[str]) -> set[str]:
    """The folders, and the files beside them."""
    return {file.partition("/")[0] for file in files}


def test_training_and_evaluating_are_different_runs(tmp_path: Path) -> None:
    identities = {composed_plan(tmp_path, f"stage={stage}").identity for stage in ("sft", "reward", "ppo", "evaluate")}
    assert len(identities) == 4


@pytest.mark.parametrize(
    ("edited", "rebuilt"),
    [
        ("rollout/native.py", set()),
        ("rollout/kv_cache.py", set()),
        ("stages/ppo.py", set()),
        ("evaluation/judges.py", set()),
        ("tracking/dashboards.py", set()),
        ("report/tables.py", set()),
        ("stages/reward.py", {"reward"}),
        ("models/roles.py", {"sft", "reward"}),
        ("seeding.py", {"sft", "reward"}),
    ],
)
def test_editing_a_file_rebuilds_what_it_decides(
    edited: str, rebuilt: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identities of a copy of the package with one line added to one of its files."""

    def names() -> dict[str, str]:
        run = composed_plan(tmp_path)
        return {"sft": run.sft_folder.name, "reward": run.reward_folder.name}

    before = names()
    copy = tmp_path / "rlhf"
    shutil.copytree(identity.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(identity, "PACKAGE", copy)
    assert names() == before
    with (copy / edited).open("a") as file:
        file.write("\n# edited\n")
    after = names()
    assert {stage for stage in before if before[stage] != after[stage]} == rebuilt
