"""`judge=finished_reward_model`: the reward model of a finished run, or of the cache, as the judge of another run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from rlhf.data.records import Prompt
from rlhf.data.templates import PromptTemplate, conversation_of
from rlhf.errors import ConfigError, RowError, RunError
from rlhf.evaluation.judges import RewardModelJudge
from rlhf.finished.chat.models import ModelCache
from rlhf.finished.run import FinishedRun
from rlhf.finished.vocabulary import check_knows
from rlhf.models.tokenizing import keep_template
from rlhf.scorers import Context


class FinishedRewardModelJudge(RewardModelJudge):
    """Prefers the answer with the higher score of the reward model in `folder`.

    The reward model is loaded with its own SFT model and tokenizer, and reads prompts in its own template. If it
    annotates simulated preferences, it is the "gold" reward model of Gao et al. 2023 ("Scaling Laws for Reward Model
    Overoptimization"), from which a proxy reward model then learns.

    Args:
        context: the models and data of the run that is judged.
        folder: a run of stage=reward, or a reward model in `outputs/cache`.
        tie: scores that differ by at most this are a tie.
        max_tokens: answers are cut to this length before they are scored.

    Raises:
        ConfigError: the folder holds no reward model.
    """

    needs_reward_model: ClassVar[bool] = False
    same_tokenizer: ClassVar[bool] = False

    def __init__(self, context: Context, folder: str, tie: float = 0.0, max_tokens: int = 512):
        run = _reward_model(folder)
        roles, role = ModelCache().reward(run)
        roles.table["reward"], roles.heads["reward"] = roles.table[role], roles.heads[role]
        self.asked: PromptTemplate | None = getattr(context.source, "template", None)
        self.template = run.template or self.asked
        tokenizer = keep_template(run.tokenizer(), SimpleNamespace(template=self.template))
        own = Context(
            context.source, tokenizer, roles, microbatch_tokens=context.microbatch_tokens, cache=context.cache
        )
        super().__init__(own, tie, max_tokens)
        self._known: dict[tuple[str, str, bool], float] = {}

    def _scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """The scores of the responses, each of which is scored once, however many others it is compared with."""
        keys = [
            (row.prompt, str(text), getattr(text, "ended", True)) for row, text in zip(prompts, responses, strict=True)
        ]
        new = list({key: i for i, key in enumerate(keys) if key not in self._known}.values())
        if new:
            scores = super()._scores([prompts[i] for i in new], [responses[i] for i in new])
            self._known |= {keys[i]: score for i, score in zip(new, scores, strict=True)}
        return [self._known[key] for key in keys]

    def _prompts(self, rows: Sequence[Prompt]) -> list[str]:
        """Return the prompts in the template of the reward model; as they are if they are in none."""
        if self.asked is None or self.template is None or self.template == self.asked:
            return super()._prompts(rows)
        try:
            return [self.template.render_messages(conversation_of(row.prompt, self.asked)) for row in rows]
        except RowError as error:
            raise ConfigError(
                f"judge.folder: the template of the reward model cannot render a prompt: {error}"
            ) from None

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Check that the reward model and its SFT model exist.

        Raises:
            ConfigError: one of them is missing or damaged.
        """
        _reward_model(keys["folder"])

    @classmethod
    def check_reads(cls, keys: Mapping[str, Any], texts: Sequence[str]) -> None:
        """Check that the reward model knows the words of texts such as it will read.

        Raises:
            ConfigError: it does not.
        """
        check_knows(f"judge.folder={keys['folder']}", _reward_model(keys["folder"]).tokenizer(), texts)


def _reward_model(folder: str) -> FinishedRun:
    """The finished reward model in `folder`; errors name the key `judge.folder`."""
    try:
        run = FinishedRun.open(Path(folder).expanduser())
        _ = run.base  # raises if the SFT model is missing
    except RunError as error:
        raise ConfigError(f"judge.folder={folder}: {error}") from None
    if run.stage != "reward":
        raise ConfigError(f"judge.folder={folder} is of stage={run.stage}; allowed: stage=reward")
    if run.summary.get("reads") == "classifier":  # `rlhf.pipeline.taken.CLASSIFIER`
        raise ConfigError(
            f"judge.folder={folder} is a classifier that was taken from elsewhere, not a reward model of one matrix on "
            "the last hidden state; allowed: judge=reward_model with reward.from, or a reward model trained here"
        )
    return run
