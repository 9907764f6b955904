"""The recipes are the published runs: what follows from their keys is computed and compared with the publications."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.data.records import train_and_held_out
from rlhf.errors import DataError
from rlhf.models.assembly import add_policy_and_value
from rlhf.models.loading import skeleton
from rlhf.models.memory import TRAINED, Work, estimate, stage_memory
from rlhf.models.roles import Role, Roles
from rlhf.pipeline.builders import steps_of
from rlhf.pipeline.config import data_source
from rlhf.pipeline.fitting import with_numbers
from rlhf.settings import Settings
from rlhf.stages.ppo import PPO
from tests.helpers.composed_config import composed, composed_data, composed_settings
from tests.helpers.memory_estimates import LLAMA_7B, NEOX_20B, sizes_of
from tests.helpers.ppo_stages import make_ppo

PAPER = ("recipe=paper", "model=llama_7b", "data=alpaca_farm", "judge=reward_model")
GIB = 2**30


def made_from(config: str, *overrides: str) -> Settings:
    """The settings with the model of a configuration, which needs no network."""
    return composed_settings(*overrides, "model.name_or_path=null", f"model.config={config}")


def on_meta(settings: Settings, vocabulary: int, reward_is_whole: bool) -> Roles:
    """The roles of PPO without weights: base, reward model, and what `ppo_roles` adds to them."""
    base, reward = skeleton(settings.model, vocabulary), skeleton(settings.model, vocabulary)
    assert base is not None
    assert reward is not None
    roles = Roles(base, torch.bfloat16)
    if reward_is_whole:
        roles.add_trunk("reward", reward)
        roles.table["reward"] = Role("reward", None)
    add_policy_and_value(roles, settings, None)
    return roles


def trained(roles: Roles, trunk: str | None = None) -> int:
    parameters = (roles if trunk is None else roles.trunks[trunk]).parameters()
    return sum(p.numel() for p in parameters if p.requires_grad)


# -- Sun, Gupta & Iyyer 2023 -------------------------------------------------------------------------------------------


def test_the_paper_trains_16_781_313_weights_of_llama_7b() -> None:
    settings = made_from(LLAMA_7B, *PAPER)
    assert settings.reward.lora.r == 0  # a whole reward model
    roles = on_meta(settings, 32_000, reward_is_whole=True)
    assert trained(roles) == 16_781_313
    assert trained(roles, "base") == trained(roles, "reward") == 8_388_608  # the policy's LoRA, the value function's
    assert trained(roles) / sum(p.numel() for p in roles.trunks["base"].parameters()) == pytest.approx(0.002, abs=0.001)
    needed = stage_memory("ppo", settings_with_numbers(settings), sizes_of(settings, 32_000), Work(("ppo",), True))
    assert needed.trained == TRAINED * 2 * 8_388_608  # the estimate leaves out the head


def settings_with_numbers(settings: Settings) -> Settings:
    return with_numbers(settings, sizes_of(settings, 32_000), Work(("ppo",), True, on_gpu=True), 80 * GIB)


def rates(settings: Settings, folders: SimpleNamespace, folder: Path, *steps: int) -> list[float]:
    """The learning rates of a PPO stage with these settings, relative to the peak."""
    stage: PPO = make_ppo(settings, folders, folder / "samples.jsonl", warm=False)
    return [stage.lr_factor(step) for step in steps]


def test_the_papers_learning_rate_at_step_100_is_88_percent_of_the_peak(
    folders: SimpleNamespace, tmp_path: Path
) -> None:
    for steps in (100, 180):  # how many steps follow does not matter
        settings = composed_settings(
            *PAPER, f"ppo.steps={steps}", "generation.batch_size=8", "ppo.microbatch_tokens=60"
        )
        assert settings.ppo.schedule_steps == 20_000 * 10 // 256
        first, peak, last = rates(settings, folders, tmp_path, 0, 5, 99)
        assert (peak, last) == (1.0, pytest.approx(0.88, abs=0.005))
        assert 0 < first < 1
    ends = composed_settings(*PAPER, "ppo.schedule_steps=null", "generation.batch_size=8", "ppo.microbatch_tokens=60")
    assert rates(ends, folders, tmp_path, 99)[0] < 0.02


def test_the_paper_is_measured_at_the_steps_of_its_figures() -> None:
    table, figure = (composed_settings(*PAPER, f"ppo.steps={steps}").ppo for steps in (100, 180))
    assert [step for step in range(181) if figure.evaluates(step)] == [0, 20, 40, 60, 80, 100, 140, 180]
    assert [step for step in range(101) if table.evaluates(step)] == [0, 20, 40, 60, 80, 100]
    assert figure.eval_interval == 20


def test_a_footnote_of_the_paper_one_gpu_for_every_stage() -> None:
    stages = ("sft", "reward", "ppo")
    work, sizes = Work(stages, True, on_gpu=True), sizes_of(made_from(LLAMA_7B, *PAPER), 32_000)
    needed = {}
    for recipe in ("paper", "paper_lora"):
        settings = with_numbers(made_from(LLAMA_7B, *PAPER, f"recipe={recipe}"), sizes, work, 79 * GIB)
        needed[recipe] = {stage: stage_memory(stage, settings, sizes, work).peak / GIB for stage in stages}
        trains = (settings.sft.lora.r, settings.reward.lora.r)
        assert trains == ((0, 0) if recipe == "paper" else (8, 8))
    assert max(needed["paper_lora"].values()) < 79
    assert min(needed["paper"]["sft"], needed["paper"]["reward"]) > 100  # 16 bytes for each of 6.7 billion weights
    assert needed["paper"]["ppo"] < 79
    settings = made_from(LLAMA_7B, *PAPER, "recipe=paper_lora")
    assert settings.reward.lora.target_modules == settings.sft.lora.target_modules == settings.lora.target_modules
    adapter = sizes.adapter(settings.lora)
    assert stage_memory("reward", settings, sizes, work).trained == TRAINED * adapter == TRAINED * 8_388_608


def test_the_paper_trains_its_stages_as_long_as_alpacafarm() -> None:
    settings = composed_settings(*PAPER)
    assert steps_of(settings.sft, 10_000) == 235
    assert steps_of(settings.reward, 10_000 - settings.reward.validation_size) == 594
    updates = settings.ppo.epochs * settings.ppo.rollout_batch_size // settings.ppo.minibatch_size
    assert updates == 4  # optimiser steps per rollout batch


# -- StackLLaMA --------------------------------------------------------------------------------------------------------


def write_pairs(folder: Path, part: str, count: int) -> None:
    """A part of the paired data set: questions with two answers, named after the part."""
    target = folder / "data" / part
    target.mkdir(parents=True)
    rows = [
        {"qid": f"{part}{i}", "question": f"{part} {i}?", "response_j": f"good {i}", "response_k": f"bad {i}"}
        for i in range(count)
    ]
    (target / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_stage_of_stackllama_reads_its_own_part_of_the_data(tmp_path: Path) -> None:
    parts = {"sft": "finetune", "preference": "reward", "preference_validation": "evaluation", "prompts": "rl",
             "eval": "evaluation"}  # fmt: skip
    for part in set(parts.values()):
        write_pairs(tmp_path, part, 30)
    sources = composed("recipe=stackllama").data.sources
    assert {split: source.data_dir for split, source in sources.items()} == {k: f"data/{v}" for k, v in parts.items()}
    local = [f"data.sources.{split}.path={tmp_path}" for split in parts]
    data = composed_source("recipe=stackllama", *local)
    assert set(data.splits) == set(parts)
    for split, part in parts.items():
        rows = data.load(split)
        assert len(rows) == 30
        assert all(f"Question: {part} " in prompt for prompt in rows["prompt"])


def composed_source(*overrides: str) -> object:
    return data_source(composed(*overrides))


def test_stackllama_trains_on_100_000_pairs_and_holds_out_50_000(tmp_path: Path) -> None:
    for part, count in (("reward", 100_500), ("evaluation", 50_500)):
        write_pairs(tmp_path, part, count)
    splits = ("preference", "preference_validation")
    data = composed_source("recipe=stackllama", *(f"data.sources.{split}.path={tmp_path}" for split in splits))
    settings = composed_settings("recipe=stackllama")
    train, held_out = train_and_held_out(data, *splits, settings.reward.validation_size)  # type: ignore[arg-type]
    assert (len(train), len(held_out)) == (100_000, 50_000)
    assert settings.reward.batch_size / 8 == 4  # on each of 8 GPUs
    assert steps_of(settings.reward, len(train)) == 100_000 / 32  # one epoch


def test_stackllamas_sft_reads_fewer_tokens_than_its_rows_have() -> None:
    config, settings = composed("recipe=stackllama"), composed_settings("recipe=stackllama")
    tokens = steps_of(settings.sft, 10**9) * settings.sft.batch_size * settings.sft.max_length
    assert tokens == 5_000 * 32 * 1_024
    assert tokens / config.data.max_rows.sft < 350  # tokens that an answer with its question must have on average


# -- TRL + PEFT --------------------------------------------------------------------------------------------------------


def test_one_epoch_of_sft_for_imdb_in_packs_of_1_024_tokens() -> None:
    settings = composed_settings("recipe=imdb_20b")
    assert settings.sft.packing == "joined"
    sequences = 15_000 * 290 // settings.sft.max_length  # reviews of the split, tokens of a review
    assert steps_of(settings.sft, sequences) == -(-sequences // 8)  # one epoch


@pytest.mark.parametrize(
    ("recipe", "config", "vocabulary", "card"),
    [("stackllama", LLAMA_7B, 32_000, 40), ("imdb_20b", NEOX_20B, 50_432, 24)],
)
def test_a_recipe_fits_the_card_that_it_names(recipe: str, config: str, vocabulary: int, card: int) -> None:
    settings = made_from(config, f"recipe={recipe}")
    sizes, reward = sizes_of(settings, vocabulary), recipe == "stackllama"
    work = Work(("sft", "reward", "ppo") if reward else ("sft", "ppo"), reward, on_gpu=True)
    needed = estimate(with_numbers(settings, sizes, work, card * GIB), sizes, work)
    assert 0.5 * card < needed.peak / GIB < 0.95 * card


def test_a_source_is_refused_where_a_split_has_none(tmp_path: Path) -> None:
    write_pairs(tmp_path, "rl", 3)
    path = tmp_path / "data" / "rl" / "part.jsonl"
    data = composed_data("stack_exchange", f"data.sources={{sft: {path}}}")
    assert data.splits == ("sft",)
    with pytest.raises(DataError, match=r"^data\.sources has no source for eval; allowed: sft\.$"):
        data.load("eval")
    missing = composed_data("stack_exchange", "data.sources={sft: nowhere.jsonl}")
    with pytest.raises(DataError, match=r"^data\.sources\.sft: .*nowhere\.jsonl does not exist"):
        missing.check()  # type: ignore[attr-defined]
