"""The stage of DPO: its log-ratios and loss against plain transformers, resuming, and what stays frozen."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from rlhf.settings import LoraSettings
from rlhf.stages.dpo import DPO
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.dpo_stages import OPTIONS, dpo_stage, train_dpo
from tests.helpers.ppo_stages import LORA
from tests.helpers.supervised_stages import COMPARISONS, FULL
from tests.helpers.tiny_models import randomize_lora_b
from tests.helpers.training import changed_weights, copy_weights

DROPOUT = replace(LORA, dropout=0.3)


def warm(stage: DPO) -> DPO:
    """Move the policy away from the reference."""
    randomize_lora_b(stage.roles.adapter_parameters("base", "policy"), seed=5)
    return stage


def plain_logprobs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Log-probs of a response's tokens by a plain forward pass of one text."""
    ids = torch.tensor([[*prompt, *response]])
    logprobs = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([logprobs[at, token] for at, token in zip(places, response, strict=True)])


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("budget", [20, 60, 1000])
def test_loss_and_gradient_are_those_of_plain_passes_text_by_text(
    folders: SimpleNamespace, tmp_path: Path, budget: int, mean: bool
) -> None:
    stage = warm(dpo_stage(folders, tmp_path / "s", microbatch_tokens=budget, mean_logprobs=mean, sft_coef=0.3))
    pairs = stage.encode(COMPARISONS[:6])
    batch = stage.collate(pairs)
    parts = [stage.loss(batch.rows(rows)) for rows in stage.microbatches(batch)]
    loss = torch.stack([part for part, _ in parts]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in stage.roles.named_parameters() if p.grad is not None}

    own = copy.deepcopy(stage.roles)
    own.zero_grad()
    reference = stage.roles.copy_trunk("reference")
    total, right = torch.zeros(()), 0.0
    temperature = stage.config.generation.temperature
    for pair in pairs:
        with own.using_adapter("policy") as model:
            policy = [plain_logprobs(model, *text, temperature) for text in pair]
        with torch.no_grad():
            fixed = [plain_logprobs(reference, *text, temperature) for text in pair]
        reduce = torch.mean if mean else torch.sum
        ratios = [reduce(ours - theirs) for ours, theirs in zip(policy, fixed, strict=True)]
        total = total - F.logsigmoid(0.1 * (ratios[0] - ratios[1])) - 0.3 * policy[0].mean()
        right += float(ratios[0] > ratios[1])
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-4)
    assert float(sum(sums["accuracy"] for _, sums in parts)) == right
    total.backward()  # type: ignore[no-untyped-call]
    expected = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("lora", [LORA, DROPOUT, FULL], ids=["adapter", "dropout", "full"])
def test_before_the_first_step_policy_and_reference_are_equal_to_the_bit(
    folders: SimpleNamespace, tmp_path: Path, lora: LoraSettings
) -> None:
    stage = dpo_stage(folders, tmp_path / "s", lora)
    stage.roles.train()
    batch = stage.collate(stage.encode(COMPARISONS))
    for rows in stage.microbatches(batch):
        _, sums = stage.loss(batch.rows(rows))
        assert sums["margin"] == sums["chosen_reward"] == sums["rejected_reward"] == 0
        assert sums["accuracy"] == len(rows) / 2  # a tie counts half


def test_a_text_in_several_comparisons_is_read_once(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = warm(dpo_stage(folders, tmp_path / "s"))
    pairs = stage.encode(COMPARISONS[:1])
    same = stage.collate([pairs[0], (pairs[0][1], pairs[0][0]), pairs[0]])
    _ = stage.roles.unpadded  # finding out takes passes of its own
    read: list[int] = []
    stage.roles.trunk("policy").base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    stage.loss(same)
    assert len(read) == 2  # by the reference and by the policy
    assert max(read) <= sum(len(prompt) + len(response) for prompt, response in pairs[0])


# -- the training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, FULL], ids=["adapter", "full"])
def test_it_learns_the_comparisons_and_trains_nothing_but_the_policy(
    folders: SimpleNamespace, tmp_path: Path, lora: LoraSettings
) -> None:
    stage = dpo_stage(folders, tmp_path / "samples.jsonl", lora, reward=True, steps=12, eval_every=6)
    before, weights = train_and_weights(stage, tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "time/evaluate" in line] == [0, 6, 12]
    trained = [line for line in lines if "dpo/loss" in line]
    assert trained[0]["dpo/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert trained[-1]["dpo/loss"] < 0.5 < trained[-1]["dpo/accuracy"]
    assert trained[-1]["dpo/margin"] == pytest.approx(
        trained[-1]["dpo/chosen_reward"] - trained[-1]["dpo/rejected_reward"], abs=1e-5
    )
    assert before["eval/true_kl"] == pytest.approx(0, abs=1e-6)
    assert stage.last_evaluation["eval/true_kl"] > 0.001
    assert before["dpo/validation_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["dpo/validation_accuracy"] == 0.5
    changed = changed_weights(weights, stage.roles)
    assert changed
    assert all(name.startswith("trunks.policy.") if lora is FULL else ".policy." in name for name in changed)


def train_and_weights(stage: DPO, folder: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    weights = copy_weights(stage.roles)
    return train_dpo(stage, folder), weights


class PowerCutError(Exception):
    pass


@pytest.mark.parametrize("lora", [LORA, DROPOUT], ids=["adapter", "dropout"])
def test_a_resumed_run_ends_with_the_same_bits(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraSettings
) -> None:
    def stage_in(name: str) -> DPO:
        (tmp_path / name).mkdir(exist_ok=True)
        return dpo_stage(folders, tmp_path / name / "samples.jsonl", lora, eval_every=2, checkpoint_every=1)

    straight = stage_in("straight")
    train_dpo(straight, tmp_path / "straight")
    for step in (1, 3):
        stage = stage_in("broken")
        forward = stage.loss

        def fail(batch: Any, stage: DPO = stage, at: int = step, forward: Any = forward) -> Any:
            if torch.is_grad_enabled() and stage.steps_done == at:
                raise PowerCutError
            return forward(batch)

        monkeypatch.setattr(stage, "loss", fail)
        torch.manual_seed(step)  # nothing may depend on the global state
        with pytest.raises(PowerCutError):
            train_dpo(stage, tmp_path / "broken")
    resumed = stage_in("broken")
    torch.manual_seed(99)
    train_dpo(resumed, tmp_path / "broken")
    for name, weight in copy_weights(resumed.roles).items():
        assert torch.equal(weight, copy_weights(straight.roles)[name]), name
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(tmp_path / name)]
        for name in ("straight", "broken")
    ]
    assert lines[0] == lines[1]
    ended = stage_in("broken")  # as after a kill behind the last evaluation: nothing is left to be trained
    train_dpo(ended, tmp_path / "broken")
    assert ended.steps_done == OPTIONS["steps"]
