"""The reward of a single answer by what rewarded a run's policy: its reward model or models, or a scorer of texts."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from rlhf.data.records import DataSource
from rlhf.errors import RunError, UserError, first_line
from rlhf.errors.users_code import failure_in_users_code
from rlhf.finished.chat.models import ModelCache, score
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import Response
from rlhf.pipeline.config import instantiate, target_class
from rlhf.pipeline.users_functions import named_function
from rlhf.policy_settings import METHODS
from rlhf.scorers import TextContext, scores_texts
from rlhf.scorers.columns import asked_columns
from rlhf.scorers.ensemble import COMBINE, Ensemble
from rlhf.scorers.reward_model import RewardModelScorer
from rlhf.scorers.text import FunctionScorer

log = logging.getLogger(__name__)


class TextReward:
    """Asks a scorer of texts about one prompt and one answer, as PPO does about many.

    Args:
        config: `scorer` of the run.
        source: the data set of the run, whose prompts may have columns that a function asks for.
        device: where a classifier runs.

    Raises:
        ConfigError: the scorer cannot be made, such as a function that cannot be imported.
        DataError: what it needs of the data set cannot be read.
    """

    name: ClassVar[str] = "reward"

    def __init__(self, config: DictConfig, source: DataSource, device: str):
        self.path, self.required = config.get("function", config["_target_"]), []
        if "function" in config:
            asked = asked_columns(named_function("scorer.function", self.path))[0]
            self.required = [name for name, needed in asked.items() if needed]
        self.scorer = instantiate(config, "scorer", TextContext(source, roles=SimpleNamespace(device=device)))

    def __call__(self, prompt: str, ids: list[int], response: Response) -> float:
        """The reward of an answer; rewards of its tokens are summed.

        Raises:
            RunError: a function asks for columns that only the prompts of the data have, or it fails.
        """
        columns = self.scorer.columns([prompt]) if isinstance(self.scorer, FunctionScorer) else {}
        missing = [name for name in self.required if columns.get(name, [None]) == [None]]
        if missing:
            raise RunError(f"{self.path} asks for {', '.join(missing)}, which this prompt does not have")
        try:
            return float(self.scorer.rate([prompt], [response]))
        except UserError as error:
            raise RunError(str(error)) from None
        except Exception as error:  # of the user's code: the conversation goes on
            reason = failure_in_users_code(error) or f"{type(error).__name__}: {first_line(error)}"
            raise RunError(f"{self.path} failed: {reason}") from error


class ModelReward:
    """The score by the reward model of a run, less its baseline, or by the ensemble of them.

    It is called "reward model" where that is not the whole reward, such as under scorer=weighted_sum.
    """

    def __init__(self, run: FinishedRun, reward: FinishedRun, models: ModelCache):
        scorer = OmegaConf.create(run.config.get("scorer") or {})
        kind = target_class(scorer, "scorer") if scorer else RewardModelScorer
        self.name = "reward" if kind in (RewardModelScorer, Ensemble) else "reward model"
        every = [reward, *(run.members if kind is Ensemble else [])]
        self.parts = [(models.reward(each), each.metrics["reward/baseline"]) for each in every]
        self.combine: Callable[[Tensor, float], Tensor] = COMBINE["mean"]
        self.coef = 0.0
        if kind is Ensemble:
            self.combine, self.coef = COMBINE[scorer.combine], scorer.uncertainty_coef
        elif kind is RewardModelScorer and scorer.get("baseline") is not None:
            self.parts = [(part, scorer.baseline) for part, _ in self.parts]

    def __call__(self, prompt: str, ids: list[int], response: Response) -> float:
        """The score of an answer."""
        scores = [score(part, ids, list(response.ids)) - baseline for part, baseline in self.parts]
        return float(self.combine(torch.tensor(scores)[:, None], self.coef))


def reward_of(run: FinishedRun, label: str, source: DataSource, models: ModelCache) -> TextReward | ModelReward | None:
    """What rewards the answers of a run; None, with a warning if there should be one, if there is nothing.

    Raises:
        RunError, ModelError: the run's reward model is missing or cannot be loaded.
    """
    scorer = OmegaConf.create(run.config.get("scorer") or {}) if run.stage in METHODS else None
    try:
        if scorer and scores_texts(target_class(scorer, "scorer")):
            return TextReward(scorer, source, models.device)
    except UserError as error:
        log.warning("%s: no reward: %s", label, error)
        return None
    if run.reward_reads == "ids" and run.reward:  # a reward model that was only the judge is no reward
        return ModelReward(run, run.reward, models)
    if scorer and not getattr(target_class(scorer, "scorer"), "needs_reward_model", False):
        log.warning("%s: no reward: scorer._target_=%s scores whole rollouts", label, scorer["_target_"])
    return None
