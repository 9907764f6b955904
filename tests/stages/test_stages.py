"""Gradients of all three stages against plain torch and transformers, schedules, and the order of rows."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.records import Comparison
from rlhf.models.roles import Roles
from rlhf.models.tokenizing import encode_pairs
from rlhf.policy_settings import OptimizerSettings
from rlhf.seeding import mixed_seed
from rlhf.stages.base import Stage
from rlhf.stages.batches import SeededBatches
from rlhf.stages.losses import Losses
from rlhf.stages.reward import longer_accuracy
from tests.helpers.calls import record_calls
from tests.helpers.ppo_stages import LORA, make_ppo, ppo_settings, train
from tests.helpers.supervised_stages import COMPARISONS, DEMONSTRATIONS, NO_CLIPPING, reward_stage, sft_stage
from tests.helpers.training import changed_weights, copy_weights, fit, record_gradients

EOS = 1


def one_step(stage: Any, rows: list, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of the first optimiser step by name, and the metrics logged."""
    names = [name for name, p in stage.named_parameters() if p.requires_grad]
    batches = SeededBatches(len(rows), len(rows), 0, 1)
    with record_gradients() as seen:
        metrics = fit(stage, stage.encode(rows), batches, folder)
    assert len(seen) == 1
    assert len(seen[0]) == len(names)
    return {name: grad for name, grad in zip(names, seen[0], strict=True) if grad is not None}, metrics[-1]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- supervised fine-tuning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["response", "text"])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("microbatch_tokens", [16, 100000])
def test_sft_gradient_is_that_of_transformers(
    folders: SimpleNamespace, tmp_path: Path, loss_on: str, packing: bool, microbatch_tokens: int
) -> None:
    """The gradient equals that of one padded batch with Hugging Face's loss, for any micro-batches and packing."""
    stage = sft_stage(folders, loss_on=loss_on, packing=packing, microbatch_tokens=microbatch_tokens, log_every=1)
    got, metrics = one_step(stage, DEMONSTRATIONS, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(folders.sft).eval()
    tokenizer = folders.tokenizer
    ids = torch.zeros(len(DEMONSTRATIONS), 48, dtype=torch.long)
    labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, row in enumerate(DEMONSTRATIONS):
        prompt, response = tokenizer(row.prompt)["input_ids"], [*tokenizer(row.response)["input_ids"], EOS]
        n = len(prompt) + len(response)
        ids[i, :n], seen[i, :n] = torch.tensor(prompt + response), 1
        labels[i, 0 if loss_on == "text" else len(prompt) : n] = ids[i, 0 if loss_on == "text" else len(prompt) : n]
    loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
    loss.backward()
    assert metrics["sft/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_close(got, {f"roles.trunks.base.{name}": p.grad for name, p in model.named_parameters()})


def test_sft_adapter_trains_alone(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = sft_stage(folders, LORA, microbatch_tokens=32)
    before = copy_weights(stage.roles)
    one_step(stage, DEMONSTRATIONS, tmp_path)
    trained = {name for name in before if "lora_B" in name}  # A has a gradient once B is not 0
    assert changed_weights(before, stage.roles) == trained


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("make", "rows"), [(sft_stage, DEMONSTRATIONS), (reward_stage, COMPARISONS)])
def test_checkpointed_activations_are_made_again(
    folders: SimpleNamespace, tmp_path: Path, make: Any, rows: list, checkpointed: bool
) -> None:
    stage, calls = make(folders, replace(LORA, dropout=0.5), microbatch_tokens=100000), []
    if checkpointed:
        stage.roles.checkpoint_activations()
    assert stage.roles.unpadded  # compatibility is tried before the calls are counted
    projection = stage.roles.trunk("reference").model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, *_: calls.append(module.lora_dropout.training))
    one_step(stage, rows, tmp_path)
    assert calls == [True] * (2 if checkpointed else 1)


def test_encode_pairs_cuts_without_an_eos(folders: SimpleNamespace) -> None:
    prompts, responses = ["w3 w4", "w3 w4", "w3 w4 w5 w6 w7 w8"], ["w9", "w9 w10 w11 w12", "w9 w10"]
    expected = [([3, 4], [9, EOS]), ([3, 4], [9, 10, 11]), ([5, 6, 7, 8], [9])]
    assert encode_pairs(folders.tokenizer, prompts, responses, 5) == expected


# -- reward modelling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_tokens", [2, 60, 100000])
def test_reward_gradient_is_that_of_transformers(
    folders: SimpleNamespace, tmp_path: Path, microbatch_tokens: int
) -> None:
    stage = reward_stage(folders, microbatch_tokens=microbatch_tokens, log_every=1)
    model = AutoModelForSequenceClassification.from_pretrained(folders.sft, num_labels=1).eval()
    model.score.weight.data.copy_(stage.roles.heads["reward"].weight)
    got, metrics = one_step(stage, COMPARISONS, tmp_path)

    def score(prompt: str, response: str) -> Tensor:
        ids = [*folders.tokenizer(f"{prompt} {response}")["input_ids"], EOS]
        return model(input_ids=torch.tensor([ids])).logits[0, 0]

    margins = torch.stack([score(row.prompt, row.chosen) - score(row.prompt, row.rejected) for row in COMPARISONS])
    loss = F.softplus(-margins).mean()
    loss.backward()
    assert metrics["reward/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["reward/train_accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert 0 < metrics["reward/train_accuracy"] < 1
    expected = {f"roles.trunks.base.{name}": p.grad for name, p in model.named_parameters() if name != "score.weight"}
    expected["roles.heads.reward.weight"] = model.score.weight.grad
    assert_close(got, expected)


def test_the_length_baseline_counts_longer_chosen_responses() -> None:
    rows = [Comparison("p", "long answer", "short"), Comparison("p", "ab", "longer"), Comparison("p", "ab", "cd")]
    assert longer_accuracy(rows) == 0.5
    assert longer_accuracy(rows[:1]) == 1
    assert longer_accuracy(rows[1:]) == 0.25


def test_baseline_is_the_mean_score_of_demonstrations(folders: SimpleNamespace) -> None:
    stage = reward_stage(folders, LORA, microbatch_tokens=40)
    model = AutoModelForSequenceClassification.from_pretrained(folders.sft, num_labels=1).eval()
    model.score.weight.data.copy_(stage.roles.heads["reward"].weight)
    with torch.no_grad():
        rows = [[*folders.tokenizer(f"{r.prompt} {r.response}")["input_ids"], EOS] for r in DEMONSTRATIONS]
        scores = [float(model(input_ids=torch.tensor([ids])).logits) for ids in rows]
    assert stage.baseline(DEMONSTRATIONS) == pytest.approx(sum(scores) / len(scores), abs=1e-5)


# -- the gradient of PPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["adapter", "trunk_head"])
def test_the_ppo_gradient_is_that_of_plain_autograd(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """Tiny micro-batches, one micro-batch, and clipped losses written out row by row give the same gradient."""
    results = {}
    for budget in (24, 100000):
        options = {"microbatch_tokens": budget, "steps": 1, "epochs": 2, "minibatch_size": 12, "value_model": value}
        stage = make_ppo(ppo_settings(max_grad_norm=NO_CLIPPING, lr=0.05, **options), folders, tmp_path / "samples")
        stage.roles.heads["value"].weight.data.normal_(generator=torch.Generator().manual_seed(5))
        experiences, losses = (
            record_calls(monkeypatch, stage, "make_experience"),
            record_calls(monkeypatch, Losses, "policy"),
        )
        with record_gradients() as seen:
            train(stage, tmp_path / str(budget))
        results[budget] = seen[0], experiences[0][1], len(losses)
    (tiny, experience, many), (whole, _, few) = results[24], results[100000]
    assert many > 2 * 4
    assert few == 2
    for a, b in zip(tiny, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    roles: Roles = make_ppo(ppo_settings(value_model=value), folders, tmp_path / "samples").roles
    roles.heads["value"].weight.data.normal_(generator=torch.Generator().manual_seed(5))
    batch, total, count = experience.sequences, torch.zeros(()), int(experience.mask.sum())
    for i, (start, end) in enumerate(zip(batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)):
        ids, n = batch.ids[i : i + 1, :end], end - start
        with roles.using_adapter("policy") as model:
            table = (model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1] / 0.9).log_softmax(-1)
        with roles.using_adapter("value") as model:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, start - 1 : -1]
        ratio = (table[torch.arange(n), ids[0, start:]] - experience.old_logprobs[i, :n]).exp()
        advantages, returns, old = (getattr(experience, k)[i, :n] for k in ("advantages", "returns", "old_values"))
        values = hidden @ roles.heads["value"].weight[0]
        total = total - torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()
        clipped = torch.minimum(torch.maximum(values, old - 0.2), old + 0.2)
        total = total + 0.1 * 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum()
    (total / count).backward()
    expected = [p.grad for p in roles.parameters() if p.requires_grad]
    for a, b in zip(whole, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# -- schedule and order ----------------------------------------------------------------------------------------------


# two warm-up steps of six: 1/3, 2/3, then four steps from 1 downwards
@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_the_schedule_agrees_with_hand_computation(schedule: str, rates: list[float]) -> None:
    stage = Stage(OptimizerSettings(lr=0.1, warmup_steps=2, schedule=schedule), 6)
    assert [stage.lr_factor(step) for step in range(6)] == pytest.approx(rates)


def test_no_step_trains_at_rate_zero(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = make_ppo(ppo_settings(steps=4, lr=0.3, warmup_steps=1, epochs=1), folders, tmp_path / "samples")
    assert [row["ppo/lr"] for row in train(stage, tmp_path)] == pytest.approx([0.15, 0.3, 0.2, 0.1])


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5), st.integers(0, 12))
def test_seeded_batches_depend_on_seed_and_step_only(rows: int, size: int, seed: int, start: int) -> None:
    """Batches depend only on (seed, step) and are a permutation in each epoch, also if a batch straddles two epochs."""
    steps = 15
    whole = list(SeededBatches(rows, size, seed, steps))
    assert len(whole) == steps
    assert list(SeededBatches(rows, size, seed, steps, start)) == whole[start:]
    assert SeededBatches(rows, size, seed, steps).batch(start) == whole[start]
    flat = [row for batch in whole for row in batch]
    for epoch in range(len(flat) // rows):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_streams_are_independent() -> None:
    assert len({mixed_seed(s, p, i) for s in range(5) for p in ("order", "rollout", "deal") for i in range(50)}) == 750
    assert SeededBatches(50, 50, 0, 2).batch(0) != SeededBatches(50, 50, 1, 2).batch(0)
    first, second = SeededBatches(50, 50, 0, 2)
    assert first != second


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ["policy", "backward", "value", "backward"]),
        ({"value_model": "trunk_head"}, ["policy", "backward"]),
    ],
)
def test_the_activations_of_one_loss_are_freed_before_those_of_the_next(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], wanted: list
) -> None:
    """The passes of an update, which keep activations, and its backward passes, which free them, in order."""
    stage = make_ppo(
        ppo_settings(steps=1, epochs=1, minibatch_size=12, microbatch_tokens=100000, **options),
        folders, tmp_path / "samples",
    )  # fmt: skip
    events: list[str] = []
    states, backward = Roles.states, stage.manual_backward

    def pass_of(roles: Roles, role: str, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            events.append(role)
        return states(roles, role, *args)

    monkeypatch.setattr(Roles, "states", pass_of)
    monkeypatch.setattr(stage, "manual_backward", lambda loss: (events.append("backward"), backward(loss)))
    train(stage, tmp_path / "run")
    assert events == wanted
