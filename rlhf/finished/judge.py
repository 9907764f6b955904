"""`judge=finished_reward_model`: the reward model of a finished run or of the cache, as a judge of anything else."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from rlhf.errors import ConfigError, RunError
from rlhf.evaluation.judges import RewardModelJudge
from rlhf.finished.chat.models import Models
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import keep_template
from rlhf.scorers import Context


class FinishedRewardModelJudge(RewardModelJudge):
    """The reward model in `folder` decides, on its own SFT model and with its own tokenizer.

    As the annotator of simulated preferences it is the "gold" reward model of Gao et al. 2023 ("Scaling laws for reward
    model overoptimization"), from which a proxy learns.

    Raises:
        ConfigError: the folder holds no reward model.
    """

    needs_reward_model: ClassVar[bool] = False
    same_tokenizer: ClassVar[bool] = False

    def __init__(self, context: Context, folder: str, tie: float = 0.0, max_tokens: int = 512):
        run = _reward_model(folder)
        roles, role = Models().reward(run)
        roles.table["reward"], roles.heads["reward"] = roles.table[role], roles.heads[role]
        tokenizer = keep_template(run.tokenizer(), context.source)
        super().__init__(replace(context, tokenizer=tokenizer, roles=roles), tie, max_tokens)

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """See whether the reward model and what it stands on are there.

        Raises:
            ConfigError: one of them is not.
        """
        _reward_model(keys["folder"])


def _reward_model(folder: str) -> FinishedRun:
    try:
        run = FinishedRun.open(Path(folder).expanduser())
        _ = run.base  # found, or said to be gone
    except RunError as error:
        raise ConfigError(f"judge.folder={folder}: {error}") from None
    if run.stage != "reward":
        raise ConfigError(f"judge.folder={folder} is of stage={run.stage}; allowed: stage=reward")
    return run
