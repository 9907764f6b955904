"""Best-of-n distillation and expert iteration: what is sampled, chosen and learnt, and resuming."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from rlhf.data.records import Prompt
from rlhf.errors import DamagedError
from rlhf.files import read_lines
from rlhf.models.assembly import policy_roles
from rlhf.pipeline.train_policy import train_policy
from rlhf.policy_settings import BestOfNSettings, ExpertIterationSettings
from rlhf.scorers import Context
from rlhf.scorers.text import FunctionScorer
from rlhf.stages.best_of_n import BestOfN, ExpertIteration
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.dpo_stages import no_metrics
from tests.helpers.ppo_stages import LORA, PROMPTS, count_low_words, ppo_settings
from tests.helpers.scorer_context import NoSource
from tests.helpers.training import copy_weights, quiet_trainer

OPTIONS: dict[str, Any] = {
    "n": 4, "steps": 4, "batch_size": 6, "lr": 1e-2, "lr_full": 1e-3, "eval_every": 2, "log_every": 1,
    "checkpoint_every": 1, "microbatch_tokens": 60, "missing_eos_penalty": 0.25,
}  # fmt: skip


def best_of_n_stage(folders: SimpleNamespace, folder: Path, rounds: int = 0, **options: Any) -> BestOfN:
    """The stage of best-of-n distillation, or with `rounds` of expert iteration, before its first step."""
    config = {**OPTIONS, **options}
    settings = replace(
        ppo_settings(lora=replace(LORA, dropout=0.2)),
        best_of_n=BestOfNSettings(**config),
        expert_iteration=ExpertIterationSettings(rounds=rounds or 1, **config),
    )
    torch.manual_seed(0)
    roles = policy_roles(settings, folders.tokenizer, folders.sft, None, None)
    context = Context(NoSource(), folders.tokenizer, roles)
    scorer = FunctionScorer(context, f"{count_low_words.__module__}.{count_low_words.__name__}")
    kind = ExpertIteration if rounds else BestOfN
    return kind(settings, roles, folders.tokenizer, scorer, no_metrics, folder / "samples.jsonl")


def train(stage: BestOfN, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    evaluation: DataLoader = DataLoader([Prompt(p, "w5") for p in PROMPTS[:4]], batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    train_policy(quiet_trainer, stage, PROMPTS, evaluation, folder, "auto")


def test_the_best_of_n_answers_to_each_prompt_are_learnt(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = best_of_n_stage(folders, tmp_path)
    learnt: list[tuple] = []
    collate = stage.collate

    def record(rows: list) -> Any:
        learnt.extend((tuple(prompt), tuple(response)) for prompt, response in rows)
        return collate(rows)

    stage.collate = record  # type: ignore[method-assign]
    train(stage, tmp_path)
    rows = read_lines(tmp_path / "answers" / "round-001.jsonl")
    assert len(rows) == 24
    assert sorted(learnt) == sorted((tuple(row["prompt_ids"]), tuple(row["response_ids"])) for row in rows)
    assert sorted(row["prompt"] for row in rows) == sorted(PROMPTS)  # 24 prompts, one epoch of them
    for row in rows:
        (own,) = count_low_words([row["prompt"]], [row["response"]])
        assert len(row["scores"]) == 4
        assert max(row["scores"]) == pytest.approx(own - 0.25 * (not row["ended"]))
        assert row["ended"] == (row["response_ids"][-1] == folders.tokenizer.eos_token_id)
    (first,) = [line for line in read_metrics(tmp_path) if "best_of_n/score" in line]
    assert first["step"] == 1
    assert first["best_of_n/score"] > first["best_of_n/mean_score"]


def test_imitation_of_the_best_raises_the_score_of_the_next_round(folders: SimpleNamespace, tmp_path: Path) -> None:
    options = {"steps": 24, "batch_size": 12, "epochs": 6, "n": 6, "lr": 0.05, "eval_every": 100}
    train(best_of_n_stage(folders, tmp_path, rounds=2, missing_eos_penalty=0.0, **options), tmp_path)
    lines = read_metrics(tmp_path)
    scores = [line["best_of_n/mean_score"] for line in lines if "best_of_n/mean_score" in line]
    losses = [line["best_of_n/loss"] for line in lines if "best_of_n/loss" in line]
    assert losses[11] < losses[0]  # of the first round
    assert scores[1] > scores[0] + 0.05


def test_more_epochs_sample_fewer_answers(folders: SimpleNamespace, tmp_path: Path) -> None:
    train(best_of_n_stage(folders, tmp_path, epochs=2), tmp_path)
    assert len(read_lines(tmp_path / "answers" / "round-001.jsonl")) == 12


class PowerCutError(Exception):
    pass


def test_a_resumed_run_ends_with_the_same_bits(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted in a step, and in the middle of the sampling of the second round."""
    train(straight := best_of_n_stage(folders, tmp_path / "straight", rounds=2), tmp_path / "straight")
    for moment in ("loss", "scorer"):
        stage = best_of_n_stage(folders, tmp_path / "broken", rounds=2)

        forward = getattr(stage, moment)

        def fail(part: Any, stage: BestOfN = stage, forward: Any = forward, moment: str = moment) -> Any:
            if stage.steps_done == 1 and moment == "loss":
                raise PowerCutError
            if stage.steps_done == 2 and moment == "scorer" and len(part.prompts) == 48:
                raise PowerCutError
            return forward(part)

        monkeypatch.setattr(stage, moment, fail)
        torch.manual_seed(7)
        with pytest.raises(PowerCutError):
            train(stage, tmp_path / "broken")
    assert not (tmp_path / "broken" / "answers" / "round-002.jsonl").exists()
    (tmp_path / "broken" / "answers" / ".round-002.jsonl.123").touch()  # of a process that was killed while it wrote
    train(resumed := best_of_n_stage(folders, tmp_path / "broken", rounds=2), tmp_path / "broken")
    for name, weight in copy_weights(resumed.roles).items():
        assert torch.equal(weight, copy_weights(straight.roles)[name]), name
    assert {path.name for path in (tmp_path / "broken" / "answers").iterdir()} == {"round-001.jsonl", "round-002.jsonl"}
    for number in (1, 2):
        name = f"answers/round-00{number}.jsonl"
        assert (tmp_path / "straight" / name).read_text() == (tmp_path / "broken" / name).read_text()
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(tmp_path / name)]
        for name in ("straight", "broken")
    ]
    assert json.dumps(lines[0]) == json.dumps(lines[1])


def test_answers_that_are_not_whole_are_not_learnt(folders: SimpleNamespace, tmp_path: Path) -> None:
    train(best_of_n_stage(folders, tmp_path), tmp_path)
    path = tmp_path / "answers" / "round-001.jsonl"
    count = len(read_lines(path))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DamagedError, match=f"holds {count - 1} of {count} answers; allowed: resume=never"):
        best_of_n_stage(folders, tmp_path).answers(0)
