"""PPO with a real Lightning trainer: the first ratio, which weights change, penalties, resuming."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf import ppo
from rlhf.models import heads
from rlhf.models.assembly import lora_config
from rlhf.models.export import save_adapter
from rlhf.models.sequences import Sequences
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.rollout.factory import use_captured_logprobs
from rlhf.settings import LoraSettings
from rlhf.stages.minibatches import split_minibatches
from rlhf.stages.ppo import PPO
from tests.helpers.calls import record_calls
from tests.helpers.ppo_stages import LORA, count_low_words, make_ppo, ppo_settings, train
from tests.helpers.training import changed_weights, copy_weights, record_gradients


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_first_ratio_is_one(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    settings = ppo_settings(lora=replace(LORA, dropout=dropout), epochs=1, minibatch_size=12, steps=3)
    stage = make_ppo(settings, folders, tmp_path / "samples")
    losses, experiences = (
        record_calls(monkeypatch, ppo, "policy_losses"),
        record_calls(monkeypatch, stage, "make_experience"),
    )
    metrics = train(stage, tmp_path)
    assert len(losses) > 6  # several micro-batches per update: the ratio of the first update of a rollout is 1
    for (logprobs, old, *_), _ in losses:
        torch.testing.assert_close(logprobs.detach(), old, rtol=1e-5, atol=1e-5)
    assert [row["ppo/first_ratio"] for row in metrics] == pytest.approx([1.0] * 3, abs=1e-5)
    assert [row["ppo/ratio"] for row in metrics] == pytest.approx([1.0] * 3, abs=1e-5)
    (rollouts, *_), experience = experiences[0]
    gap = (experience.old_logprobs - rollouts.logprobs).abs().max()
    assert gap > 0.1 if dropout else gap == 0  # dropout masks are really applied


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.9, 1.8])
def test_samples_of_another_distribution_are_seen_though_scoring_again_hides_them(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, temperature: float
) -> None:
    stage = make_ppo(ppo_settings(steps=1, warmup_steps=0), folders, tmp_path / "samples")
    stage.roles.compute_dtype = getattr(torch, precision)
    stage.captured_are_old = use_captured_logprobs(stage.config.generation, stage.roles)
    generate = stage.engine.generate
    monkeypatch.setattr(
        stage.engine, "generate", lambda *args: generate(*args[:2], replace(args[2], temperature=temperature))
    )
    (row,) = train(stage, tmp_path)
    gap, sound = row["ppo/sampling_gap"], temperature == 0.9
    if precision == "float32":  # captured log-probs are the old log-probs
        assert gap == row["ppo/first_log_ratio"]
        assert gap < 1e-5 if sound else gap > 0.3
    else:  # scored again: the first ratio is 1 whatever was sampled
        assert row["ppo/first_log_ratio"] == pytest.approx(0, abs=1e-3)
        assert 1e-4 < gap < 0.1 if sound else gap > 0.3


def test_ratios_move_after_the_first_minibatch(folders: SimpleNamespace, tmp_path: Path) -> None:
    for row in train(make_ppo(ppo_settings(), folders, tmp_path / "samples"), tmp_path):
        assert row["ppo/first_ratio"] == pytest.approx(1, abs=1e-5)
        assert abs(row["ppo/ratio"] - 1) > 1e-4


CASES = {
    "adapters": {},
    "trunk_head": {"value_model": "trunk_head"},
    "full value": {"value_model": "full"},
    "full tuning": {"lora": LoraSettings(r=0)},
}


@pytest.mark.parametrize("case", CASES)
def test_only_policy_and_value_adapters_change(folders: SimpleNamespace, tmp_path: Path, case: str) -> None:
    """Only policy and value adapters change, although reference passes run before each update."""
    stage = make_ppo(ppo_settings(**CASES[case]), folders, tmp_path / "samples")
    roles, before = stage.roles, copy_weights(stage.roles)
    with record_gradients() as seen:
        train(stage, tmp_path)
    assert len(seen) == 2 * 2 * 2  # steps · epochs · minibatches
    trained = {name for name, p in roles.named_parameters() if p.requires_grad}
    moved = changed_weights(before, roles)
    assert moved == trained - {"trunks.value.lm_head.weight"}  # a value function does not use it
    assert sum(grad is not None for grad in seen[0]) == len(moved)
    head = "heads.value.weight"
    policy = {name for name in moved if ".policy." in name}
    value = moved - policy
    assert policy
    if case == "adapters":
        assert value == {head} | {name for name in before if ".lora_" in name and ".value." in name}
        # a zero head passes no gradient to its adapter before its first update; after it everything has a gradient
        assert all(grad is not None and grad.abs().max() > 0 for grad in seen[1])
    elif case == "trunk_head":
        assert value == {head}
    else:
        assert value == {head} | {name for name in before if name.startswith("trunks.value.") and "lm_head" not in name}
    if case == "full tuning":
        assert policy == {name for name in before if name.startswith("trunks.policy.")}
    pristine = AutoModelForCausalLM.from_pretrained(folders.sft).state_dict()
    base = {name.replace(".base_layer", ""): p for name, p in roles.trunks["base"].state_dict().items()}
    assert all(torch.equal(base[name], value) for name, value in pristine.items())


@pytest.mark.parametrize("reward", [True, False])
def test_the_value_starts_as_the_reward_model(
    folders: SimpleNamespace, tmp_path: Path, make_texts: Callable, reward: bool
) -> None:
    """The value adapter starts with the reward model's hidden states and a zero head, at any rank and scale."""
    lora = replace(LORA, r=6, alpha=30.0)
    roles = make_ppo(ppo_settings(lora=lora), folders, tmp_path / "s", reward, warm=False).roles
    batch = make_texts(3, seed=0)
    with torch.no_grad():
        expected = roles.hidden("reward" if reward else "reference", batch)
        torch.testing.assert_close(roles.hidden("value", batch), expected, rtol=1e-4, atol=1e-5)
        assert roles.heads["value"](expected).abs().max() == 0


@pytest.mark.parametrize("name", ["exact_kl", "exact_jensen_shannon"])
def test_exact_penalties_agree_with_brute_force(
    folders: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 7 * 50)
    stage = make_ppo(ppo_settings(name, "logits", steps=1), folders, tmp_path / "samples")
    config = lora_config(LORA, stage.roles.trunk("policy"))
    save_adapter(stage.roles, "policy", config, folders.sft, tokenizer, tmp_path / "policy")
    experiences = record_calls(monkeypatch, stage, "make_experience")
    train(stage, tmp_path)
    policy = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    reference = AutoModelForCausalLM.from_pretrained(folders.sft).eval()
    experience = experiences[0][1]
    batch = experience.sequences
    for i, (start, end) in enumerate(zip(batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)):
        ids = batch.ids[i : i + 1, :end]
        with torch.no_grad():
            p, q = (
                (m(input_ids=ids).logits[0, start - 1 : -1] / 0.9).softmax(-1).double() for m in (policy, reference)
            )
        m = (p + q) / 2
        kl, js = (p * (p / q).log()).sum(-1), ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
        expected = {"exact_kl": kl, "exact_jensen_shannon": js}[name].float()
        torch.testing.assert_close(experience.penalty[i, : end - start], expected, rtol=1e-3, atol=1e-5)
        assert (experience.penalty[i, end - start :] == 0).all()


def test_without_divergence_there_is_no_reference_pass(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ppo_settings("none", "none", steps=4, reference_every=2, epochs=1)
    stage = make_ppo(settings, folders, tmp_path / "samples")
    calls = record_calls(monkeypatch, stage.roles, "states")
    made, ends = [], record_calls(monkeypatch, stage, "update")
    monkeypatch.setattr(stage.scorer, "function", lambda p, r: made.append(len(calls)) or count_low_words(p, r))
    metrics = train(stage, tmp_path)
    steps = [slice(a, b) for a, b in zip(made, [*made[1:], None], strict=True)]
    assert [any(args[0] == "reference" for args, _ in calls[step]) for step in steps] == [False, True, False, True]
    assert ["ppo/k1" in row for row in metrics] == [False, True, False, True]
    assert all((args[0].penalty == 0).all() for args, _ in ends)


def test_missing_eos_costs_the_penalty(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaped = []
    for penalty in (0.0, 1.5):
        settings = ppo_settings(steps=1, whiten_rewards=False, missing_eos_penalty=penalty)
        stage = make_ppo(settings, folders, tmp_path / "samples")
        experiences = record_calls(monkeypatch, stage, "make_experience")
        train(stage, tmp_path / str(penalty))
        (rollouts, *_), experience = experiences[0]
        shaped.append(experience.rewards)
    assert 0 < int(rollouts.ended.sum()) < 12
    expected = torch.zeros_like(shaped[0])
    for i, end in enumerate(rollouts.mask.sum(1).tolist()):
        expected[i, end - 1] = 0.0 if rollouts.ended[i] else -1.5
    torch.testing.assert_close(shaped[1] - shaped[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_continues_with_the_same_bits(folders: SimpleNamespace, tmp_path: Path, dropout: float) -> None:
    settings = ppo_settings(lora=replace(LORA, dropout=dropout), steps=4)

    def run(folder: Path, start: int = 0, **options: Any) -> tuple[PPO, list[dict[str, float]]]:
        stage = make_ppo(settings, folders, tmp_path / "samples", kl=ppo.AdaptiveKL(0.05, 6.0, 0.1))
        checkpoints = StepCheckpoints(folder / "checkpoints", 2)
        return stage, train(stage, folder, start, callbacks=[checkpoints], **options)

    straight, whole = run(tmp_path / "a")
    saved = tmp_path / "a" / "checkpoints"
    assert sorted(path.name for path in saved.glob("*.ckpt")) == ["step-000002.ckpt", "step-000004.ckpt"]
    torch.manual_seed(99)  # the global generator must not matter
    resumed, rest = run(tmp_path / "b", 2, ckpt_path=saved / "step-000002.ckpt")
    assert [row["step"] for row in rest] == [3, 4]
    for a, b in zip(whole[2:], rest, strict=True):
        same = {key for key in a if not key.startswith("time") and key != "ppo/rollouts_per_second"}
        assert {key: a[key] for key in same} == {key: b[key] for key in same}
    assert not changed_weights(copy_weights(straight.roles), resumed.roles)
    assert resumed.kl.coef == straight.kl.coef != 0.05
    states = [stage.trainer.optimizers[0].state_dict() for stage in (straight, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for key, state in states[0]["state"].items():
        assert all(torch.equal(value, states[1]["state"][key][name]) for name, value in state.items())


def test_as_published_takes_more_and_smaller_steps(folders: SimpleNamespace, tmp_path: Path) -> None:
    """The fault of the published code, in small: 12 rollouts in minibatches of 6 become 3 updates of 2 rows each."""
    counts, first = {}, {}
    for accumulation in ("exact", "as_published"):
        settings = ppo_settings(accumulation=accumulation, published_rows=2, steps=1)
        stage = make_ppo(settings, folders, tmp_path / accumulation)
        with record_gradients() as steps:
            train(stage, tmp_path / accumulation)
        counts[accumulation], first[accumulation] = len(steps), steps[0]
    assert counts == {"exact": 2 * 2, "as_published": 2 * 2 * 3}
    assert any(
        a is not None and not torch.allclose(a, b) for a, b in zip(first["exact"], first["as_published"], strict=True)
    )


def test_the_published_shape_means_32_steps_where_4_were_meant(folders: SimpleNamespace, tmp_path: Path) -> None:
    shape = {"rollout_batch_size": 256, "minibatch_size": 128, "published_rows": 16}
    steps = {}
    for accumulation in ("exact", "as_published"):
        stage = make_ppo(ppo_settings(accumulation=accumulation, **shape), folders, tmp_path / "samples")
        prompts, shares = split_minibatches(["w5"] * 256, stage.ppo.minibatch_size, 3, step=1)
        minibatches = stage.split_microbatches(
            Sequences.from_lists([[5]] * len(prompts), [[5, 5, 5]] * len(prompts)), shares
        )
        taken = [part for minibatch in minibatches for part in stage.optimizer_steps(minibatch)]
        steps[accumulation] = len(taken) * stage.ppo.epochs
        assert all(len(part) == 8 and len(part[0].rows) == 16 for part in taken) or accumulation == "exact"
    assert steps == {"exact": 4, "as_published": 32}
