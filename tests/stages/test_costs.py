"""What an evaluation says of the costs of training by a reward: forward KL, entropy, perplexities, facts, diversity."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rlhf.data.farm import Farm
from rlhf.data.records import Prompt
from rlhf.evaluation.diversity import diversity, expectation_adjusted_distinct
from rlhf.models.sequences import Sequences
from rlhf.stages.costs import Costs, forward_kl, kl_and_entropy, known_facts, perplexity
from rlhf.stages.ppo import PPO
from tests.helpers.ppo_stages import make_ppo, ppo_settings

ROWS = [([5, 7], [11, 13, 1]), ([9], [30, 31, 32, 33, 1]), ([4, 4, 4], [8, 1]), ([], [6, 7, 1])]


def test_the_two_directions_of_the_kl_agree_with_hand_computation() -> None:
    """π = (½, ½), π_ref = (¾, ¼): KL(π_ref ‖ π) = ¾ log 3/2 + ¼ log ½."""
    policy, reference = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    assert forward_kl(policy, reference).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert forward_kl(reference, policy).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


@pytest.fixture
def stage(folders: SimpleNamespace, tmp_path: Path) -> PPO:
    """A policy that is not the reference: `make_ppo` gives it a trained adapter."""
    made = make_ppo(ppo_settings(), folders, tmp_path / "samples")
    made.roles.eval()
    return made


def test_kl_and_entropy_are_those_of_the_whole_distributions(stage: PPO) -> None:
    batch = Sequences.from_lists(*map(list, zip(*ROWS[:3], strict=True)))
    with torch.no_grad():
        own, ref = (
            (stage.roles.output(role)(stage.roles.states(role, batch, batch.predicting)) / 0.7).log_softmax(-1)
            for role in ("policy", "reference")
        )
    expected = (own.exp() * (own - ref)).sum(-1), -(own.exp() * own).sum(-1)
    for budget in (5, 1000):
        found = kl_and_entropy(stage.roles, batch, budget, 0.7)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.sort().values, theirs.sort().values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [4, 1000])
def test_perplexity_is_that_of_transformers(folders: SimpleNamespace, tmp_path: Path, budget: int) -> None:
    """Of an untrained policy: that of the SFT model, over response tokens that a state predicts."""
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples", warm=False)
    stage.roles.eval()
    model = AutoModelForCausalLM.from_pretrained(folders.sft).eval()
    losses = []
    for prompt, response in ROWS:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        nll = -logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        losses.append(nll[max(len(prompt) - 1, 0) :])
    expected = float(torch.cat(losses).mean().exp())
    assert perplexity(stage.roles, ROWS, budget) == pytest.approx(expected, rel=1e-4)


def test_a_fact_is_known_if_its_tokens_are_the_most_likely(stage: PPO) -> None:
    """Facts that the reference completes itself are known to it, and others are not."""
    beginnings = [[3, 9], [4], [17, 2, 30]]
    own = []
    for ids in beginnings:
        text = list(ids)
        for _ in range(2):
            batch = Sequences.from_lists([text], [[1]])
            with torch.no_grad():
                states = stage.roles.states("reference", batch, batch.predicting)
                text.append(int(stage.roles.output("reference")(states)[-1].argmax()))
        own.append((ids, text[len(ids) :]))
    wrong = [(prompt, [first, (second + 1) % 50]) for prompt, (first, second) in own]
    found = known_facts(stage.roles, "reference", [*own, *wrong], 7)
    assert found.tolist() == [True] * 3 + [False] * 3
    metrics = Costs(facts=[*own, *wrong]).measure(stage.roles, 7, 1.0)
    lost = known_facts(stage.roles, "policy", own, 7).logical_not().float().mean()
    assert metrics["eval/facts_lost"] == pytest.approx(float(lost))
    assert metrics["eval/facts_lost"] > 0


def test_an_untrained_policy_has_lost_nothing(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples", warm=False)
    stage.roles.eval()
    batch = Sequences.from_lists(*map(list, zip(*ROWS[:3], strict=True)))
    metrics = Costs({"text": ROWS}, ROWS[:3], lambda: batch).measure(stage.roles, 1000, 1.0)
    assert metrics.keys() == {"eval/text_perplexity", "eval/facts_known", "eval/forward_kl"} | (
        {"eval/facts_lost"} if metrics["eval/facts_known"] else set()
    )
    assert metrics["eval/forward_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics.get("eval/facts_lost", 0) == 0


def test_an_evaluation_reports_them(stage: PPO) -> None:
    """And the same ones again for the same policy; measuring them changes no other metric."""
    batch = Sequences.from_lists(*map(list, zip(*ROWS[:3], strict=True)))
    prompts = DataLoader([Prompt(f"w{3 + i} w{7 + i}") for i in range(4)], batch_size=2, collate_fn=list)  # type: ignore[arg-type]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                      inference_mode=False)  # fmt: skip

    def measured() -> dict[str, float]:
        trainer.validate(stage, prompts, verbose=False)
        return {key: value for key, value in stage.last_evaluation.items() if not key.startswith("time/")}

    plain = measured()
    stage.costs = Costs({"demonstration": ROWS}, (), lambda: batch)
    stage.config.evaluation.diversity_samples = 3
    found = measured()
    assert found == measured()
    assert {key: found[key] for key in plain} == plain
    added = {"eval/forward_kl", "eval/demonstration_perplexity", "eval/samples_distinct_1", "eval/samples_distinct_2",
             "eval/samples_ead", "eval/samples_unlike"}  # fmt: skip
    assert found.keys() - plain.keys() == added
    assert found["eval/forward_kl"] > 0
    assert 0 < found["eval/samples_distinct_2"] <= 1


def test_diversity_agrees_with_hand_computation() -> None:
    """Two prompts with two answers each; the first has 3 different words of 5, the second 1 of 2."""
    prompts = [[["a", "b", "a"], ["a", "c"]], [["d"], ["d"]]]
    found = diversity(prompts, vocabulary=4)
    assert found["eval/samples_distinct_1"] == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert found["eval/samples_distinct_2"] == pytest.approx((3 / 3 + 0) / 2)
    expected = 3 / (4 * (1 - 0.75**5)), 1 / (4 * (1 - 0.75**2))
    assert found["eval/samples_ead"] == pytest.approx(sum(expected) / 2)
    assert found["eval/samples_unlike"] == pytest.approx((1 + 1 / 2) / 2)
    assert expectation_adjusted_distinct([[]], 4) == 0


def test_the_farms_facts_are_true_and_complete() -> None:
    """Every beginning with its value states the fact, as the farm's own judge reads it."""
    farm = Farm(people=6)
    probes = farm.probes()
    assert len(probes) == 6 * 8 + 16 * 4
    for prompt, beginning, value in probes:
        stated = farm.facts(prompt, f"{beginning} {value}.")
        assert (stated.stated, stated.true) == (1, 1), (prompt, beginning, value)
