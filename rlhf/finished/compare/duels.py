"""Has players answer the evaluation prompts and a judge compare their answers, each pair of them in both orders."""

import gc
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from rlhf.data.records import DataSource, Prompt
from rlhf.evaluation.evaluator import Judge
from rlhf.files import read_json, write_json
from rlhf.finished.outputs import OutputsFile, ReferenceOutputs
from rlhf.finished.policies import Policy
from rlhf.pipeline.config import instantiate
from rlhf.pipeline.identity import digest
from rlhf.report.ranking import Array
from rlhf.scorers import TextContext
from rlhf.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Duel:
    """The comparisons of two players, by index, on all instructions.

    Attributes:
        first: one player.
        second: the other.
        in_order: [instructions]: 1 where the first player's answer is better, judged as the response to the second's;
            ½ for a tie, 0 where the second's is; NaN without a verdict.
        reversed: the same for the other order, also from the first player's point of view.
    """

    first: int
    second: int
    in_order: Array
    reversed: Array

    @property
    def outcomes(self) -> Array:
        """[instructions]: the mean of both orders, so that a judge who always prefers one place finds ties.

        NaN unless both were judged.
        """
        return (self.in_order + self.reversed) / 2

    @property
    def consistency(self) -> float:
        """The share of instructions with the same verdict in both orders, among those judged in both."""
        judged = ~np.isnan(self.outcomes)
        return float((self.in_order == self.reversed)[judged].mean()) if judged.any() else float("nan")


def hash_of(content: Any) -> str:
    """Hex digest of JSON content, such as texts, in which no word may be taken for the name of a file."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def answers_identity(policy: Policy, prompts: Sequence[Prompt], settings: Settings, known: Path) -> str:
    """A digest of what decides a policy's answers: its weights, the prompts, the decoding and the precision."""
    evaluation, generation, model = settings.evaluation, settings.generation, settings.model
    return digest(
        {
            "policy": policy.identity(known),
            "prompts": hash_of([[row.prompt, row.instruction] for row in prompts]),
            "decoding": [evaluation.temperature, evaluation.max_new_tokens],
            "sampling": [settings.seed, generation.engine, generation.batch_size],
            "weights": [model.dtype, settings.quantization, model.attn_implementation],
        },
        known=known,
    )


def is_known(policy: Policy, prompts: Sequence[Prompt], settings: Settings, source: DataSource, cached: Path) -> bool:
    """Whether a policy needs not be asked: its answers have been sampled before, or are read from a file.

    Raises:
        DataError: the file or the data set has no answer to one of the prompts.
    """
    if isinstance(policy, OutputsFile | ReferenceOutputs):
        policy.answers(prompts, settings, source)
        return True
    return _answers_path(policy, prompts, settings, cached).exists()


def answers_of(
    policy: Policy, prompts: Sequence[Prompt], settings: Settings, source: DataSource, cached: Path
) -> list[str]:
    """The answers of a policy; those of a model are sampled once and kept in `cached`, whoever judges them.

    Raises:
        UserError: the model cannot be loaded, or there is no answer to one of the prompts.
    """
    if isinstance(policy, OutputsFile | ReferenceOutputs):
        return policy.answers(prompts, settings, source)
    from rlhf.models.tokenizing import Response

    path = _answers_path(policy, prompts, settings, cached)
    if path.exists():
        log.info("%s: its %d answers are known (%s)", policy.label, len(prompts), path)
        return [Response(*row) for row in read_json(path)["answers"]]
    log.info("%s answers %d prompts", policy.label, len(prompts))
    answers = policy.answers(prompts, settings, source)
    gc.collect()  # the model and its roles refer to each other, and the next one needs the memory
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(str(text), getattr(text, "ids", ()), getattr(text, "ended", True)) for text in answers]
    write_json(path, {"label": policy.label, "answers": rows})
    return answers


def _answers_path(policy: Policy, prompts: Sequence[Prompt], settings: Settings, cached: Path) -> Path:
    return cached / "answers" / f"{answers_identity(policy, prompts, settings, cached / 'digests')}.json"


def judge_all(judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[Duel]:
    """Compare the answers of each player with those of each other.

    Args:
        judge: called with one player's answers as responses and the other's as reference outputs, then the other way
            round. A judge that draws the order in which it sees a pair thus sees both; it has seen one of them already
            if an evaluation of that policy was against these outputs, and answers from its cache.
        prompts: the evaluation prompts.
        answers: those of each player.
    """
    duels = []
    for first, second in combinations(range(len(answers)), 2):
        in_order = outcomes(judge, prompts, answers[first], answers[second])
        duels.append(Duel(first, second, in_order, 1 - outcomes(judge, prompts, answers[second], answers[first])))
    return duels


def outcomes(judge: Judge, prompts: Sequence[Prompt], ours: Sequence[str], theirs: Sequence[str]) -> Array:
    """[instructions]: the judge's outcomes for `ours` against `theirs`; equal answers are a tie and not judged."""
    found = np.full(len(prompts), 0.5)
    different = [i for i in range(len(prompts)) if ours[i] != theirs[i]]
    if different:
        rows = [replace(prompts[i], reference_output=theirs[i]) for i in different]
        verdicts = judge(rows, [ours[i] for i in different])
        found[different] = [np.nan if verdict is None else verdict for verdict in verdicts]
    return found


class ConfiguredJudge:
    """The judge of a configuration; its metrics (`judge/*`: questions, tokens, cost) are added up over its calls."""

    def __init__(self, config: DictConfig, source: DataSource, cached: Path):
        self.judge: Judge = instantiate(config.judge, "judge", TextContext(source, cache=cached))
        self.usage: dict[str, float] = {}

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[float | None]:
        """Judge, and add up what it took."""
        verdicts = self.judge(prompts, responses)
        report: Mapping[str, Any] = getattr(self.judge, "report", {})
        self.usage = {key: self.usage.get(key, 0) + value for key, value in report.items()}
        return verdicts
