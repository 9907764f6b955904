"""What a dry run says of each stage: memory, time, and what would be fetched."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.data.farm import Farm
from rlhf.models.memory import Work
from rlhf.pipeline import fetching
from rlhf.pipeline.estimates import in_words
from rlhf.pipeline.speed import Speed
from rlhf.pipeline.timing import Texts, Times, count_texts
from tests.helpers.command_line import TINY, error_sentence
from tests.helpers.composed_config import composed, composed_settings
from tests.helpers.memory_estimates import sizes_of

LENGTHS = {"sft": Texts(1000, 10, 20), "preference": Texts(600, 10, 20), "prompts": Texts(300, 12, 0),
           "eval": Texts(50, 12, 0)}  # fmt: skip


class CountedPasses:
    """In the place of `Speed`: every token costs a second, with gradients 3, and every sampled token 10."""

    device = "cpu"

    def per_token(self, lora: object, budget: int, length: int, learn: bool, words: bool = True) -> float:
        return 3.0 if learn else 1.0

    def answering(self, lora: object, rows: int, prompt: int, new: float) -> float:
        return rows * new * 10.0


def seconds(stage: str, *overrides: str, answer: float = 20) -> float:
    settings = composed_settings("generation.batch_size=32", *overrides)
    work = Work((stage,), reward_model=True)
    return Times(settings, CountedPasses(), LENGTHS, work, 0, answer).stage(stage)  # type: ignore[arg-type]


def test_times_of_supervised_stages_by_hand() -> None:
    sft = ("sft.epochs=2", "sft.batch_size=80", "sft.validation_size=200")
    assert seconds("sft", *sft) == 2 * 800 * 30 * 3 + 2 * 200 * 30  # held-out texts are read before and after
    assert seconds("sft", *sft, "sft.max_steps=5") == 5 * 80 * 30 * 3 + 2 * 200 * 30
    joined = ("sft.packing=joined", "sft.loss_on=text", "sft.max_length=60", "sft.batch_size=8", "sft.epochs=2")
    assert seconds("sft", *joined, "sft.validation_size=200") == 2 * 400 * 60 * 3 + 2 * 200 * 60
    reward = ("reward.epochs=1", "reward.batch_size=10", "reward.validation_size=100")
    assert seconds("reward", *reward) == 2 * (500 * 30 * 3 + 2 * 100 * 30)  # two texts to a comparison


def test_texts_that_are_compared_together_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # 600 comparisons of 100 prompts with 4 texts each
    monkeypatch.setitem(LENGTHS, "preference", Texts(600, 10, 20, prompts=100, distinct=400))
    reward = ("reward=grouped", "reward.epochs=2", "reward.batch_size=5", "reward.validation_size=100")
    monkeypatch.setitem(LENGTHS, "preference_validation", Texts(100, 10, 20))
    assert seconds("reward", *reward) == 2 * 400 * 30 * 3 + 2 * 100 * 2 * 30


def test_prompts_and_texts_are_counted_where_they_are_compared_together() -> None:
    source = Farm(responses=4, comparisons=60)
    rows = {"preference": source.load("preference")}
    counted = count_texts(rows, source.tokenizer(), prompts=10)["preference"]  # type: ignore[arg-type]
    assert (counted.rows, counted.prompts, counted.distinct) == (60, 10, 40)
    assert count_texts(rows, source.tokenizer())["preference"].prompts == 0  # type: ignore[arg-type]


def test_times_of_ppo_by_hand() -> None:
    options = ("ppo.steps=7", "ppo.warmup_steps=1", "ppo.rollout_batch_size=64", "ppo.epochs=2", "ppo.eval_every=[3,6]",
               "evaluation.prompts=40", "evaluation.kl_prompts=16", "generation.max_new_tokens=30")  # fmt: skip
    length = 12 + 20
    demonstrations = 100 * 30
    evaluation = (40 + 16) * 20 * 10 + length * (40 + 4 * 16) + demonstrations  # KL both ways
    frozen = 1 + 2  # reference, value function, reward model: the policy's log-probs are those of sampling
    step = 64 * 20 * 10 + 64 * length * (frozen + 2 * (3 + 3))
    assert seconds("ppo", *options) == 7 * step + 4 * evaluation  # at steps 0, 3, 6, 7
    assert seconds("ppo", *options, "divergence=none") == 7 * (step - 64 * length) + 4 * evaluation
    assert seconds("ppo", *options, "model.dtype=bfloat16") == 7 * (step + 64 * length) + 4 * evaluation
    longer = seconds("ppo", *options, answer=500)  # no answer is longer than generation.max_new_tokens
    assert longer == seconds("ppo", *options, answer=30) > seconds("ppo", *options)
    assert seconds("evaluate", *options) == evaluation


def test_a_pass_is_timed_at_a_few_blocks_and_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = ("model.config.hidden_size=512", "model.config.intermediate_size=2048", "model.config.num_hidden_layers=12")
    settings = composed_settings(*wide)
    speed = Speed(settings, sizes_of(settings), "cpu")
    assert speed.depths == (1, 2)
    monkeypatch.setattr(time, "perf_counter", time.process_time)  # other processes do not count
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        extrapolated = speed.per_token(settings.lora, 256, 32, learn=True)
        monkeypatch.setattr(Speed, "depths", (12,))
        whole = Speed(settings, sizes_of(settings), "cpu").per_token(settings.lora, 256, 32, learn=True)
        read = Speed(settings, sizes_of(settings), "cpu").per_token(settings.lora, 256, 32, learn=False)
    finally:
        torch.set_num_threads(threads)
    assert extrapolated == pytest.approx(whole, rel=0.4)
    assert read < 0.7 * whole


@pytest.mark.parametrize("lora", ["r8", "none"])
def test_the_made_up_model_trains_what_the_run_trains(lora: str) -> None:
    settings = composed_settings(f"lora={lora}", "model.gradient_checkpointing=true")
    sizes = sizes_of(settings)
    speed = Speed(settings, sizes, "cpu")
    roles = speed._made(4, settings.lora)
    trained = sum(p.numel() for p in roles.parameters() if p.requires_grad)
    assert trained == (sizes.adapter(settings.lora) if lora == "r8" else sizes.parameters)
    assert speed.answering(settings.lora, 4, 8, 20) > speed.answering(settings.lora, 4, 8, 3) > 0


def test_a_dry_run_describes_every_stage_that_is_still_to_be_done(command: Callable) -> None:
    code, out, err = command(*TINY, "dry_run=true")
    assert code == 0, err
    plan = OmegaConf.create(out)
    assert list(plan.cached.values()) == [False, False]
    assert plan.done is False
    assert list(plan.stages) == ["sft", "reward", "ppo"]
    for stage, described in plan.stages.items():
        assert f" for {stage} (" in described.memory
        assert described.time.startswith("about ")
    assert "every answer has 8 tokens" in plan.stages.ppo.time or "8 tokens" not in plan.time
    assert "fetches" not in plan
    assert not Path("outputs/cache").exists()
    assert command(*TINY, "stage=sft")[0] == 0
    later = OmegaConf.create(command(*TINY, "dry_run=true")[1])
    assert list(later.stages) == ["reward", "ppo"]


def test_what_would_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = OmegaConf.to_container(composed("recipe=imdb_20b"), resolve=True)
    assert fetching.checkpoints(plain) == {  # type: ignore[arg-type]
        "model.name_or_path": "EleutherAI/gpt-neox-20b, to be fetched",
        "scorer.model": "lvwerra/distilbert-imdb, to be fetched",
    }
    assert fetching.data_sets(plain["data"]) == ["stanfordnlp/imdb"]  # type: ignore[index, call-overload]
    monkeypatch.setattr(fetching, "try_to_load_from_cache", lambda name, file: "/cache" if "neox" in name else None)
    assert fetching.checkpoints(plain)["model.name_or_path"] == "EleutherAI/gpt-neox-20b, in the local cache"  # type: ignore[arg-type]
    stack = OmegaConf.to_container(composed("recipe=stackllama", f"data.sources.sft.path={tmp_path}"), resolve=True)
    assert fetching.data_sets(stack["data"]) == ["lvwerra/stack-exchange-paired"]  # type: ignore[index, call-overload]
    farm = OmegaConf.to_container(composed("data=alpaca_farm"), resolve=True)
    assert any("tatsu-lab/alpaca_farm" in name for name in fetching.data_sets(farm["data"]))  # type: ignore[index, call-overload]
    local = OmegaConf.to_container(composed("data=alpaca", f"model.name_or_path={tmp_path}"), resolve=True)
    assert fetching.checkpoints(local) == {}  # type: ignore[arg-type]
    assert fetching.data_sets(local["data"]) == []  # type: ignore[index, call-overload]


def test_data_on_the_hub_is_not_downloaded_to_estimate_a_time(command: Callable) -> None:
    code, out, err = command("debug=quick", "dry_run=true", "data=imdb", "scorer=bag_of_words", "judge=none")
    assert code == 0, err
    plan = OmegaConf.create(out)
    assert plan.time == "unknown: a dry run does not download stanfordnlp/imdb, whose rows decide it"
    assert plan.fetches.data == ["stanfordnlp/imdb"]


def test_a_dry_run_says_what_the_run_would_refuse(command: Callable, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"Say w{i}.", "output": f"w{i}"}) for i in range(60)]
    for name, lines in (("few.jsonl", rows), ("bad.jsonl", [*rows * 5, "{}"])):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    data = ("debug=quick", "dry_run=true", "stage=sft", "data=alpaca", f"data.root={tmp_path}", "data.preference=null",
            "data.preference_validation=null", "data.prompts=null", "data.eval=null", "data.sft_validation=null",
            "data.on_bad_row=fail", "data.deduplicate=false")  # fmt: skip
    code, out, error = command(*data, "data.sft=few.jsonl", "sft.warmup_steps=20")
    assert code == 2
    assert "sft.warmup_steps=20 is longer than the training: 48 rows make 1 step " in error_sentence(error)
    assert not out, "what is refused is not described"
    code, _, error = command(*data, "data.sft=bad.jsonl")
    assert code == 2
    assert "bad.jsonl, row 301" in error


def test_durations_in_words() -> None:
    assert [in_words(x) for x in (0.4, 41.2, 150, 5000, 7000)] == ["0 s", "41 s", "2 min", "83 min", "1.9 h"]
