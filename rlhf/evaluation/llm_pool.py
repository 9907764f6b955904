"""`judge=llm_pool`: language models behind any OpenAI-compatible endpoint compare responses with the references.

After AlpacaFarm (Dubois et al. 2023): a pool of annotators, that is of models and prompts, one of which judges each
pair. (Its noise of 25 % flipped labels belongs to training data only.)
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rlhf.data.records import Prompt
from rlhf.errors import ConfigError
from rlhf.evaluation.client import ChatClient, uniform
from rlhf.evaluation.endpoint import ClientSettings, Endpoint, Price, Request, check_client, check_sampling
from rlhf.evaluation.prompts import ChatTemplate, load_template, own_files
from rlhf.schema import at_least_zero, choice, positive, typed
from rlhf.scorers import Context

PLACEHOLDERS = {"instruction", "output_1", "output_2"}
MEANING = {"1": 1.0, "a": 1.0, "2": 0.0, "b": 0.0, "draw": 0.5, "tie": 0.5}  # for the output shown first


@dataclass
class AnnotatorSettings:
    """One annotator: a prompt file and its share of the pool; what is null is the pool's."""

    prompt: str
    weight: float = positive(1.0)
    model: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    price: Price | None = None
    answer: str | None = None


@dataclass
class PoolSettings:
    """`conf/judge/llm_pool.yaml` says what each key means."""

    model: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    vote: str = choice("one", "all")
    order: str = choice("random", "both")
    sampling: dict[str, Any] = field(default_factory=dict)
    answer: str = (
        r"(?im)^[\W_]*(?:final\s+|my\s+)*verdict[\W_]*(?:is[\W_]+)?(?:(?:answer|output|response|option|writer)[\W_]*)?"
        r"(?:a\s+)?(1|2|a|b|draw|tie)[\W_]*$"
    )
    attempts: int = positive(3)
    reask_temperature: float = at_least_zero(0.7)
    price: Price = field(default_factory=Price)
    client: ClientSettings = field(default_factory=ClientSettings)
    pool: dict[str, AnnotatorSettings] = field(default_factory=dict)


@dataclass(frozen=True)
class Annotator:
    """A model with a prompt, ready to be asked."""

    template: ChatTemplate
    weight: float
    model: str
    sampling: dict[str, Any]
    price: Price
    parse: Callable[[str], float | None]

    def request(self, instruction: str, first: str, second: str) -> Request:
        """The question whose answer is 1 (the first is better), 0 (the second) or ½."""
        messages = self.template.render(instruction=instruction, output_1=first, output_2=second)
        return Request(self.model, messages, self.parse, self.sampling, self.price)


class LLMPool:
    """A weighted pool of annotators; 1 a win, ½ a draw, 0 a loss, None where no answer could be read.

    Which annotator judges a pair and which output it sees first is a hash of (seed, prompt): the same in every run and
    every process. `report` holds the tokens, the cost and the unreadable answers of the last call.
    """

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, **keys: Any):
        self.settings, self.annotators = _read(keys)
        settings = self.settings
        folder = context.cache / "judge"
        self.client = ChatClient(settings.client, folder, "judge.client", settings.attempts, settings.reask_temperature)
        self.report: dict[str, float] = {}

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """See whether prompts, packages, addresses and keys are there.

        Raises:
            ConfigError: one of them is not.
        """
        settings, _ = _read(keys)
        check_client(settings.client, "judge.client")
        check_sampling(settings.sampling, "judge.sampling")
        for name, one in settings.pool.items():
            check_sampling(one.sampling, f"judge.pool.{name}.sampling")

    @classmethod
    def files(cls, keys: Mapping[str, Any]) -> list[Path]:
        """The files whose contents decide the verdicts: prompts that are not the project's own.

        With `answering(client)` and all keys beside `client` they decide them; prices change `judge/cost` alone.
        """
        return own_files([one.prompt for one in _read(keys)[0].pool.values()])

    @classmethod
    def ping(cls, keys: Mapping[str, Any]) -> None:
        """See whether the endpoint answers, if `client.ping` says so.

        Raises:
            ConfigError: it does not.
        """
        client = _read(keys)[0].client
        if client.ping:
            Endpoint(client, "judge.client").ping()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        """The outcome of each comparison.

        Raises:
            ConfigError: the endpoint refuses all requests, or not a single answer could be read.
            Interrupted: the endpoint is out; what was judged is kept.
        """
        questions = [
            (index, annotator.weight, ours_first, self._request(annotator, row, response, ours_first))
            for index, (row, response) in enumerate(zip(prompts, responses, strict=True))
            for annotator in self._annotators_of(row.prompt)
            for ours_first in self._orders_of(row.prompt)
        ]
        answers = self.client.ask_all([request for *_, request in questions])
        votes: list[list[tuple[float, float]]] = [[] for _ in prompts]
        for (index, weight, ours_first, _), answer in zip(questions, answers, strict=True):
            if answer is not None:
                votes[index].append((weight, answer if ours_first else 1 - answer))
        outcomes = [sum(w * x for w, x in row) / sum(w for w, _ in row) if row else None for row in votes]
        self.report = {**self.client.take_usage().metrics(), "judge/unjudged": outcomes.count(None)}
        if questions and not any(votes):
            raise ConfigError(
                f"judge.answer={self.settings.answer}: of {len(answers)} answers, each asked {self.settings.attempts}"
                " times, not one could be read; look at the prompts, judge.sampling.max_tokens and the model"
            )
        return outcomes

    def _annotators_of(self, prompt: str) -> list[Annotator]:
        if self.settings.vote == "all":
            return self.annotators
        point = uniform(self.settings.seed, "annotator", prompt) * sum(one.weight for one in self.annotators)
        for annotator in self.annotators:
            point -= annotator.weight
            if point < 0:
                return [annotator]
        return [self.annotators[-1]]

    def _orders_of(self, prompt: str) -> tuple[bool, ...]:
        """Whether ours is shown first, once or both ways."""
        if self.settings.order == "both":
            return (True, False)
        return (uniform(self.settings.seed, "order", prompt) < 0.5,)

    @staticmethod
    def _request(annotator: Annotator, row: Prompt, response: str, ours_first: bool) -> Request:
        shown = (response, row.reference_output) if ours_first else (row.reference_output, response)
        return annotator.request(row.instruction or row.prompt, *shown)


def reader(pattern: str, key: str) -> Callable[[str], float | None]:
    """A parser: the group of the pattern, wherever it matches, says 1, 2 or draw; nothing, or two things, is no answer.

    Raises:
        ConfigError: no regular expression, or not one with exactly one group.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}={pattern} is no regular expression: {error}") from None
    if expression.groups != 1:
        raise ConfigError(f"{key}={pattern} must have exactly one group, which matches one of {', '.join(MEANING)}")

    def parse(text: str) -> float | None:
        said = {MEANING.get(found.lower()) for found in expression.findall(text)}
        return said.pop() if len(said) == 1 else None

    return parse


def _read(keys: Mapping[str, Any]) -> tuple[PoolSettings, list[Annotator]]:
    settings = typed(PoolSettings, {key: value for key, value in keys.items() if key != "_target_"}, "judge.")
    if not settings.pool:
        raise ConfigError("judge.pool is empty; allowed: at least one annotator with a prompt")
    return settings, [_annotator(settings, name, one) for name, one in settings.pool.items()]


def _annotator(settings: PoolSettings, name: str, one: AnnotatorSettings) -> Annotator:
    key = f"judge.pool.{name}"
    model = settings.models.get(one.model, one.model) if one.model else settings.model
    if not model:
        raise ConfigError(f"{key}.model has no value; allowed: the name under which the endpoint knows a model")
    return Annotator(
        load_template(one.prompt, PLACEHOLDERS, f"{key}.prompt"),
        one.weight,
        model,
        {**settings.sampling, **one.sampling},
        one.price or settings.price,
        reader(one.answer or settings.answer, f"{key}.answer" if one.answer else "judge.answer"),
    )
