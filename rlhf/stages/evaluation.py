"""Measures a policy in Lightning's validation loop: its answers, their judgement, the true KL."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Prompt
from rlhf.distributed import collectives
from rlhf.evaluation.diversity import diversity
from rlhf.files import OUTCOMES, read_lines
from rlhf.models.roles import Roles
from rlhf.policy_settings import PolicySettings
from rlhf.rollout.engine import Engine
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.scorers import totals
from rlhf.seeding import generator
from rlhf.settings import Settings
from rlhf.stages.base import Stage
from rlhf.stages.costs import Costs, kl_and_entropy

Scorer = Callable[[Rollouts], Tensor]
Evaluator = Callable[[Sequence[Prompt], Sequence[str]], tuple[dict[str, float], list[dict[str, Any]]]]


@dataclass(frozen=True)
class _Measured:
    """The answers to a batch of evaluation prompts, with a reward and a length each.

    And of tokens sampled at the training temperature the true KL and the entropy (the policy's, in another order), and
    for some prompts the ids of several answers.
    """

    index: int
    prompts: list[Prompt]
    responses: list[str]
    rewards: Tensor
    lengths: Tensor
    kl: Tensor
    entropy: Tensor
    several: list[list[list[int]]]


class PolicyEvaluation(Stage):
    """A stage with a policy that can be measured. `evaluator` returns metrics and a record per response."""

    config: Settings
    settings: PolicySettings
    roles: Roles
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    scorer: Callable[[Rollouts], Tensor]
    evaluator: Evaluator
    samples: Path
    last_evaluation: dict[str, float]
    costs: Costs | None = None

    def stream(self, purpose: str, step: int) -> torch.Generator:
        """The random stream of a purpose at a step, on the device."""
        return generator(self.config.seed, purpose, step, str(self.roles.device))

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement of the present policy, if one is due.

        While it trains, Lightning asks at regular intervals, and `eval_every` may be a list of steps.
        """
        training = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self._due = not training or self.settings.evaluates(self.steps_done)
        self.roles.eval()
        self._started = time.perf_counter()
        self._measured: list[_Measured] = []

    def validation_step(self, batch: list[Prompt], index: int) -> None:
        """Answer a batch of evaluation prompts; measure the true KL on tokens sampled at the training temperature.

        Of `evaluation.best_of` answers to a prompt, the one with the highest score counts. The processes take turns.
        The random stream depends on the batch alone, so that their number changes nothing.
        """
        if not self._due or index % collectives.size() != collectives.rank():
            return
        config, texts = self.config.evaluation, [row.prompt for row in batch]
        answers = rollout(
            self.engine, self.roles, "policy", self.tokenizer, [text for text in texts for _ in range(config.best_of)],
            self.config.generation, self.stream("evaluation", index), config.temperature, config.max_new_tokens,
        )  # fmt: skip
        rewards = totals(self.scorer(answers))
        best = (
            rewards.view(len(texts), config.best_of).argmax(1)
            + torch.arange(len(texts), device=rewards.device) * config.best_of
        )
        left = config.kl_prompts - index * self.config.generation.batch_size
        kl, entropy, several = torch.empty(0), torch.empty(0), []
        if left > 0:
            sampled = rollout(
                self.engine, self.roles, "policy", self.tokenizer, texts[:left], self.config.generation,
                self.stream("true KL", index),
            )  # fmt: skip
            temperature = self.config.generation.temperature
            kl, entropy = kl_and_entropy(self.roles, sampled.sequences, self.settings.microbatch_tokens, temperature)
            several = self._several(texts[:left], index)
        responses = [answers.responses[row] for row in best.tolist()]
        lengths = answers.mask.sum(1)[best]
        self._measured.append(
            _Measured(index, batch, responses, rewards[best].cpu(), lengths.cpu(), kl, entropy, several)
        )

    def _several(self, prompts: list[str], index: int) -> list[list[list[int]]]:
        """For each prompt the ids of `evaluation.diversity_samples` answers; nothing if none are asked for."""
        number = self.config.evaluation.diversity_samples
        if not number:
            return []
        sampled = rollout(
            self.engine, self.roles, "policy", self.tokenizer, [prompt for prompt in prompts for _ in range(number)],
            self.config.generation, self.stream("diversity", index),
        )  # fmt: skip
        ids = sampled.sequences.responses()
        return [ids[start : start + number] for start in range(0, len(ids), number)]

    def on_validation_epoch_end(self) -> None:
        """Judge the answers of all processes, append to the samples and outcomes, log `eval/*`."""
        if not self._due:
            return
        parts = [part for process in collectives.all_gather(self._measured) for part in process]
        parts.sort(key=lambda part: part.index)
        prompts = [prompt for part in parts for prompt in part.prompts]
        responses = [response for part in parts for response in part.responses]
        metrics, records = collectives.on_rank_zero(lambda: self.evaluator(prompts, responses))
        rewards, lengths = torch.cat([part.rewards for part in parts]), torch.cat([part.lengths for part in parts])
        for record, reward, length in zip(records, rewards.tolist(), lengths.tolist(), strict=True):
            record |= {"reward": reward, "tokens": length}
        shown = records[: self.config.evaluation.samples]
        metrics |= collectives.on_rank_zero(lambda: self._write(records, shown))
        if self.costs:
            budget, temperature = self.config.ppo.microbatch_tokens, self.config.generation.temperature
            metrics |= self.costs.measure(self.roles, budget, temperature)
        if several := [answers for part in parts for answers in part.several]:
            metrics |= diversity(several, len(self.tokenizer))
        metrics |= {
            "eval/reward": float(rewards.mean()),
            "eval/response_tokens": float(lengths.float().mean()),
            "eval/true_kl": float(torch.cat([part.kl for part in parts]).mean()),
            "eval/entropy": float(torch.cat([part.entropy for part in parts]).mean()),
            **self.measured_beside(),
            "time/evaluate": time.perf_counter() - self._started,
        }
        # the metrics are written last of the three files: their line marks the evaluation as complete
        self.last_evaluation = self.emit(metrics, self.steps_done, bar=["eval/win_rate", "eval/true_kl"])
        for dashboard in self.dashboards if shown else []:
            dashboard.log_samples(shown, self.steps_done)

    def measured_beside(self) -> dict[str, float]:
        """Metrics of the stage's own, measured with every evaluation."""
        return {}

    def loader(self, rows: Sequence[Any], start: int) -> DataLoader:
        """The training data in batches, from step `start` on."""
        raise NotImplementedError

    def _write(self, records: list[dict[str, Any]], shown: list[dict[str, Any]]) -> dict[str, float]:
        """Append samples and outcomes to their files; return how far the outcomes are below the best earlier ones."""
        with self.samples.open("a", encoding="utf-8") as file:
            for record in shown:
                file.write(json.dumps({"step": self.steps_done, **record}, ensure_ascii=False) + "\n")
        numbers = {key: [row[key] for row in records] for key, x in records[0].items() if not isinstance(x, str)}
        path = self.samples.with_name(OUTCOMES)
        earlier = read_lines(path) if path.exists() else []
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.steps_done, **numbers}) + "\n")
        # the last evaluation of a step counts; later steps are left of an interrupted process and will be made again
        before = {line["step"]: line for line in earlier if line["step"] < self.steps_done}
        return falls([before[step] for step in sorted(before)], numbers)


def falls(before: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> dict[str, float]:
    """How far win rate and gold utility are below their best evaluation so far, with the standard error of the fall.

    All evaluations use the same prompts, so that their errors are not independent: what is hard for one policy is hard
    for the next. The standard error is therefore that of the differences paired by prompt.
    """
    metrics = {}
    for key, column in {"eval/win_rate": "win", "eval/gold_utility": "gold_utility"}.items():
        earlier = [line[column] for line in before if any(x is not None for x in line.get(column, ()))]
        if not earlier or column not in now:
            continue
        best = max(earlier, key=lambda values: statistics.fmean(x for x in values if x is not None))
        pairs = zip(best, now[column], strict=False)
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if len(best) == len(now[column]) and len(differences) > 1:
            metrics[f"{key}_fall"] = statistics.fmean(differences)
            metrics[f"{key}_fall_se"] = statistics.stdev(differences) / len(differences) ** 0.5
    return metrics
