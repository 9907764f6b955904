"""Sums of scorers, clipping and normalization of scores, and best-of-n."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import ppo
from rlhf.data.farm import Farm
from rlhf.errors import ConfigError
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.pipeline.config import instantiate, needs
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context
from rlhf.scorers.combine import WeightedSum
from rlhf.stages.ppo import PPO
from tests.helpers.composed_config import composed
from tests.helpers.ppo_stages import make_ppo, ppo_settings, train
from tests.helpers.scorer_context import NoSource


def rollouts(responses: list[list[int]]) -> Rollouts:
    batch = Sequences.from_lists([[3, 4]] * len(responses), responses)
    texts = [" ".join(map(str, ids)) for ids in responses]
    return Rollouts(batch, None, torch.ones(len(responses), dtype=torch.bool), ["3 4"] * len(responses), texts)


def first_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.split()[0]) for response in responses]


def term(weight: float, target: str, **keys: Any) -> dict[str, Any]:
    return {"weight": weight, "scorer": {"_target_": f"rlhf.scorers.{target}", **keys}}


LLAMA = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
PARTS = Farm().tokenizer(), Roles(LlamaForCausalLM(LLAMA))
CONTEXT = Context(NoSource(), *PARTS)


def test_a_weighted_sum_agrees_with_hand_computation() -> None:
    function = term(2.0, "text.FunctionScorer", function=f"{__name__}.first_number")
    scorer = WeightedSum(CONTEXT, {"a": function, "b": term(0.5, "combine.LengthPenalty", free=2)})
    scores = scorer(rollouts([[7, 8, 9, 9, 9], [5], [6, 6]]))
    torch.testing.assert_close(scores, torch.tensor([14 - 1.5, 10.0, 12.0]))


@pytest.mark.parametrize("terms", [{}, {"a": {"weight": 1}}, {"a": {"weight": 1, "scorer": {"function": "x"}}}])
def test_malformed_sums_are_refused(terms: dict) -> None:
    with pytest.raises(ConfigError, match=r"scorer\.terms"):
        WeightedSum(CONTEXT, terms)


def test_a_sum_needs_what_its_terms_need() -> None:

    assert needs(composed("scorer=weighted_sum"), "scorer", "needs_reward_model")
    other = composed("scorer=weighted_sum", "~scorer.terms.reward")
    assert not needs(other, "scorer", "needs_reward_model")
    scorer = instantiate(other.scorer, "scorer", CONTEXT)
    assert scorer(rollouts([[7, 8]])).tolist() == pytest.approx([-0.04])


@given(st.lists(st.lists(st.floats(-50, 50), min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores(batches: list[list[float]]) -> None:
    normalizer = ppo.ScoreNormalizer("standardize", None)
    for batch in batches:
        result = normalizer(torch.tensor(batch))
    everything = torch.tensor([x for batch in batches for x in batch], dtype=torch.float64)
    assert normalizer.mean == pytest.approx(float(everything.mean()), abs=1e-4)
    variance = normalizer.squares / normalizer.count
    assert variance == pytest.approx(float(everything.var(correction=0)), abs=1e-3)
    if variance > 1e-3:
        expected = (torch.tensor(batches[-1]) - everything.mean()) / everything.std(correction=0)
        torch.testing.assert_close(result, expected.float(), rtol=1e-3, atol=1e-3)


def test_scores_are_scaled_clipped_or_unchanged() -> None:
    scores = torch.tensor([-4.0, 0.0, 4.0, 8.0])
    assert ppo.ScoreNormalizer("none", None)(scores) is scores
    assert ppo.ScoreNormalizer("none", 3.0)(scores).tolist() == [-3, 0, 3, 3]
    torch.testing.assert_close(ppo.ScoreNormalizer("scale", None)(scores), scores / 20**0.5)
    assert torch.isfinite(ppo.ScoreNormalizer("standardize", None)(torch.ones(3))).all()


def test_resuming_continues_the_running_moments(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Checkpoints contain the running moments: four steps and two plus two resumed steps see the same scores."""
    from rlhf.pipeline.checkpoints import StepCheckpoints

    settings = ppo_settings(score_normalization="standardize", score_clip=1.5, steps=4, checkpoint_every=2)
    whole = make_ppo(settings, folders, tmp_path / "a" / "samples")
    saver = StepCheckpoints(tmp_path / "a" / "checkpoints", 2, keep=9)
    rows = train(whole, tmp_path / "a", callbacks=[saver])
    half = make_ppo(settings, folders, tmp_path / "b" / "samples")
    again = train(half, tmp_path / "b", start=2, ckpt_path=tmp_path / "a/checkpoints/step-000002.ckpt")
    assert half.normalizer.state_dict() == whole.normalizer.state_dict()
    assert whole.normalizer.count == 4 * 12
    assert [row["ppo/reward"] for row in again] == [row["ppo/reward"] for row in rows[2:]]


def test_the_best_of_several_answers_counts(folders: SimpleNamespace, tmp_path: Path) -> None:
    from lightning import Trainer
    from torch.utils.data import DataLoader

    from rlhf.data.records import Prompt

    kept: dict[int, Tensor] = {}

    def evaluate(stage: PPO, answers: int) -> float:
        stage.config.evaluation.best_of, stage.config.evaluation.temperature = answers, 1.0
        stage.evaluator = lambda prompts, responses: ({}, [{"response": r} for r in responses])  # type: ignore[assignment]
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
                          inference_mode=False)  # fmt: skip
        prompts = [Prompt(f"w{3 + i} w{7 + i}") for i in range(8)]
        trainer.validate(stage, DataLoader(prompts, batch_size=4, collate_fn=list), verbose=False)  # type: ignore[arg-type]
        kept[answers] = torch.cat([part.rewards for part in stage._measured])
        responses = [response for part in stage._measured for response in part.responses]
        assert len(responses) == 8
        scored = [stage.scorer.function([""], [r])[0] for r in responses]  # type: ignore[attr-defined]
        assert scored == pytest.approx(kept[answers].tolist())
        return float(kept[answers].mean())

    single, best = (evaluate(make_ppo(ppo_settings(), folders, tmp_path / "s"), n) for n in (1, 8))
    assert best > single + 0.1
