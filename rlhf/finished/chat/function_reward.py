"""The reward of a single answer by a function of the user's, for runs with `scorer=function`."""

import logging

from rlhf.data.records import DataSource
from rlhf.errors import ConfigError, DataError, RunError, first_line
from rlhf.errors.users_code import failure_in_users_code
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import Response
from rlhf.pipeline.users_functions import named_function
from rlhf.policy_settings import METHODS
from rlhf.scorers import TextContext
from rlhf.scorers.columns import asked_columns
from rlhf.scorers.text import FunctionScorer

log = logging.getLogger(__name__)


class FunctionReward:
    """Calls the function with one prompt and one answer, as PPO does with many.

    Args:
        path: `scorer.function` of the run.
        source: the data set of the run, whose prompts may have columns that the function asks for.

    Raises:
        ConfigError: the function cannot be imported.
        DataError: it asks for columns, and the rows cannot be read.
    """

    def __init__(self, path: str, source: DataSource):
        self.path, function = path, named_function("scorer.function", path)
        self.required = [name for name, needed in asked_columns(function)[0].items() if needed]
        self.scorer = FunctionScorer(TextContext(source), path)

    def __call__(self, prompt: str, response: Response) -> float:
        """The reward of an answer; rewards of its tokens are summed.

        Raises:
            RunError: the function asks for columns that only the prompts of the data have, or it fails.
        """
        columns = self.scorer.columns([prompt])
        missing = [name for name in self.required if columns.get(name, [None]) == [None]]
        if missing:
            raise RunError(f"{self.path} asks for {', '.join(missing)}, which this prompt does not have")
        try:
            return float(self.scorer.rate([prompt], [response]))
        except ConfigError as error:
            raise RunError(str(error)) from None
        except Exception as error:  # of the user's code: the conversation goes on
            reason = failure_in_users_code(error) or f"{type(error).__name__}: {first_line(error)}"
            raise RunError(f"{self.path} failed: {reason}") from error


def reward_function_of(run: FinishedRun) -> str | None:
    """The path of the function that rewarded the answers of a run; None if it had another scorer."""
    scorer = run.config.get("scorer") or {}
    known = run.stage in METHODS and scorer.get("_target_") == f"{FunctionScorer.__module__}.{FunctionScorer.__name__}"
    return str(scorer["function"]) if known else None


def function_reward(path: str, label: str, source: DataSource) -> FunctionReward | None:
    """The reward by a function, or a warning that says why there is none."""
    try:
        return FunctionReward(path, source)
    except (ConfigError, DataError) as error:
        log.warning("%s: no reward: %s", label, error)
    return None
