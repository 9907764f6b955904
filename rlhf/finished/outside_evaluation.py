"""Measures a policy that is no run of PPO: a model or adapter from elsewhere, an SFT model, or a file of outputs."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig

from rlhf.data.records import Prompt, as_records
from rlhf.errors import ConfigError
from rlhf.evaluation.evaluator import standard_error
from rlhf.files import METRICS, OUTCOMES, SAMPLES, write_lines
from rlhf.finished.outputs import OutputsFile, ReferenceOutputs
from rlhf.finished.policies import ALLOWED, Policy, open_policy, tokenizer_of
from rlhf.finished.vocabulary import check_knows
from rlhf.models.tokenizing import Response
from rlhf.pipeline import identity
from rlhf.pipeline.checks import check_evaluation
from rlhf.pipeline.config import data_source, instantiate, needs, settings_of, target_class
from rlhf.pipeline.evaluating import make_evaluator, ping
from rlhf.pipeline.measuring import files_of
from rlhf.pipeline.plan import Plan
from rlhf.scorers import TextContext, TextScorer, scores_texts
from rlhf.settings import Settings
from rlhf.tracking.summary import read_summary, write_summary

log = logging.getLogger(__name__)
FINISHED = "finished"  # the word for the finished run of the command's own configuration; finished@dpo: that of DPO
BATCH = 64  # prompts answered at a time where generation.batch_size=auto


@dataclass(frozen=True)
class OutsideEvaluation:
    """The measurement of a policy by `plan`, whose folder gets the results; `settings` are the plan's."""

    policy: Policy
    plan: Plan

    @classmethod
    def named(cls, config: DictConfig, folder: Path) -> "OutsideEvaluation":
        """The measurement of the policy that `config.policy` names, with all checks that need no model.

        Raises:
            UserError: there is no such policy, or it cannot be measured so.
        """
        settings, source = settings_of(config), data_source(config)
        policy = open_policy(str(config.policy), f"{FINISHED} (the run of this configuration), {ALLOWED}")
        scorer = target_class(config.scorer, "scorer")
        scores = scores_texts(scorer)
        if "eval" not in source.splits and not settings.evaluation.factscore:
            raise ConfigError(f"policy={config.policy}: the data set has no evaluation prompts; allowed: another one")
        check_evaluation(config, settings, source, False, ("scorer", "judge") if scores else ("judge",))
        if hasattr(source, "check"):
            source.check()
        if needs(config, "judge", "needs_reward_model"):
            raise ConfigError(
                f"judge=reward_model is that of a run, which policy={config.policy} has not; allowed: another judge, "
                "such as finished_reward_model with the folder of one"
            )
        if settings.evaluation.best_of > 1 and isinstance(policy, OutputsFile | ReferenceOutputs):
            raise ConfigError(f"evaluation.best_of: policy={config.policy} has one output each; allowed: 1")
        if settings.evaluation.best_of > 1 and not scores:
            raise ConfigError(
                f"evaluation.best_of: scorer={scorer.__name__} reads no texts, and policy={config.policy} is no run; "
                "allowed: a scorer of texts, such as gold, hub_reward_model, sentiment or function"
            )
        if not settings.evaluation.factscore:
            prompts = as_records(source.load("eval"), "eval")[: settings.evaluation.prompts]
            check_knows(f"policy={config.policy}", tokenizer_of(policy), [row.prompt for row in prompts])
            if isinstance(policy, OutputsFile | ReferenceOutputs):
                policy.answers(prompts, settings, source)  # raises now if there is no answer to one of them
        if settings.generation.batch_size == "auto":
            settings = replace(settings, generation=replace(settings.generation, batch_size=BATCH))
        plan = Plan(config, settings, source, folder)
        if settings.evaluation.best_of > 1:
            plan.trained_scorer = {}  # the scorer chooses the answers, and is part of no run
        return cls(policy, plan)

    @property
    def place(self) -> Path:
        """The folder of the results: the command's own."""
        return self.plan.folder

    @property
    def identity(self) -> str:
        """What decides the results: the policy, how it is decoded and judged."""
        config, known = self.plan.plain, self.plan.outputs / "cache" / "digests"
        measured = identity.of_evaluation(config, self.plan.source)
        decoded = {key: config[key] for key in ("seed", "scorer", "generation", "quantization")}
        decisive = identity.decisive({**measured, **decoded, "dtype": config["model"]["dtype"]})
        return identity.digest({**decisive, "policy": self.policy.identity(known)}, known=known)

    def todo(self) -> dict[int, Path | None]:
        """Step 0, as there is no other, if the results are not there yet."""
        summary = read_summary(self.place)
        return {} if summary and summary.get("identity") == self.identity else {0: None}

    def results(self) -> dict[str, Any]:
        """The summary of the results, which lie in `place`; answers and judges if they are not there yet."""
        if not self.todo():
            return read_summary(self.place) or {}
        started, plan = time.monotonic(), self.plan
        ping(plan.config)
        # 1. What judges, and the prompts.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        context = TextContext(plan.source, cache=plan.outputs / "cache", roles=SimpleNamespace(device=device))
        evaluator, loader = make_evaluator(plan, context, self.place)
        prompts = [row for batch in loader for row in batch]
        scores = scores_texts(target_class(plan.config.scorer, "scorer"))
        scorer = instantiate(plan.config.scorer, "scorer", context) if scores else None
        # 2. The answers, and their judgement.
        responses, scored = best_answers(self.policy, prompts, plan.settings, plan.source, scorer)
        metrics, records = evaluator(prompts, responses)
        if scored:
            metrics |= {"eval/reward": math.fsum(scored) / len(scored), "eval/reward_se": standard_error(scored)}
            records = [{**record, "reward": score} for record, score in zip(records, scored, strict=True)]
        lengths = [len(text.ids) for text in responses if isinstance(text, Response)]
        if lengths:
            metrics["eval/response_tokens"] = sum(lengths) / len(lengths)
        # 3. The files of a run's evaluation.
        metrics["time/evaluate"] = time.monotonic() - started
        self._write(metrics, records)
        more = {
            "stage": "evaluate",
            "policy": self.policy.label,
            "identity": self.identity,
            "evaluation": plan.evaluation,
            "files": files_of(plan),
        }
        return write_summary(self.place, metrics, plan.plain, started, **more)

    def _write(self, metrics: Mapping[str, float], records: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics, a result per instruction, and samples, as a run does."""
        numbers = {
            key: [row[key] for row in records] for key, value in records[0].items() if not isinstance(value, str)
        }
        shown = records[: self.plan.settings.evaluation.samples]
        files = {SAMPLES: shown, OUTCOMES: [numbers], METRICS: [{"time": round(time.time(), 3), **metrics}]}
        for name, lines in files.items():
            write_lines(self.place / name, ({"step": 0, **line} for line in lines))


def best_answers(
    policy: Policy, prompts: Sequence[Prompt], settings: Settings, source: Any, scorer: TextScorer | None
) -> tuple[list[str], list[float]]:
    """An answer to each prompt, the best of `evaluation.best_of` by the scorer, and their scores ([] without one)."""
    count = settings.evaluation.best_of
    repeated = [row for row in prompts for _ in range(count)]
    answers = policy.answers(repeated, settings, source)
    if scorer is None:
        return answers, []
    scores = scorer.rate([row.prompt for row in repeated], answers).tolist()
    best = [max(range(i, i + count), key=scores.__getitem__) for i in range(0, len(repeated), count)]
    return [answers[i] for i in best], [scores[i] for i in best]
