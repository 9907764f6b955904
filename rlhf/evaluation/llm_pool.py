"""`judge=llm_pool`: language models behind any OpenAI-compatible endpoint compare responses with the references.

Follows AlpacaFarm (Dubois et al. 2023): each pair is judged by one annotator, a model with a prompt, drawn from a pool.
AlpacaFarm's label noise of 25 % is not applied here, because it belongs to training data only.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rlhf.data.records import Prompt
from rlhf.errors import ConfigError
from rlhf.evaluation.client import ChatClient, uniform_from_hash
from rlhf.evaluation.client_settings import ClientSettings, Price, check_client, check_sampling
from rlhf.evaluation.endpoint import Endpoint, Request
from rlhf.evaluation.prompts import ChatTemplate, instruction_or_prompt, load_template, user_files
from rlhf.schema import at_least_zero, choice, positive, typed
from rlhf.scorers import Context

PLACEHOLDERS = {"instruction", "output_1", "output_2"}
# What a verdict means for the output that was shown first.
OUTCOMES = {"1": 1.0, "a": 1.0, "2": 0.0, "b": 0.0, "draw": 0.5, "tie": 0.5}


@dataclass
class AnnotatorSettings:
    """One annotator: a prompt file and its weight in the pool. None takes the value of the pool."""

    prompt: str
    weight: float = positive(1.0)
    model: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    price: Price | None = None
    answer: str | None = None


@dataclass
class PoolSettings:
    """The keys of the judge, documented in `conf/judge/llm_pool.yaml`."""

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
    """A model with a prompt and everything else that a request needs."""

    template: ChatTemplate
    weight: float
    model: str
    sampling: dict[str, Any]
    price: Price
    parse: Callable[[str], float | None]

    def request(self, instruction: str, first: str, second: str) -> Request:
        """Return the request for a verdict, which parses to 1 (the first output is better), 0 (the second) or ½."""
        messages = self.template.render(instruction=instruction, output_1=first, output_2=second)
        return Request(self.model, messages, self.parse, self.sampling, self.price)


class LLMPool:
    """A judge that asks a weighted pool of annotators.

    The annotator of a pair and the order in which it sees the two outputs follow from a hash of (seed, prompt), so they
    are the same in every run and every process.

    Attributes:
        report: Metrics of the last call: tokens, cost and unreadable answers (`judge/*`).
    """

    needs_reward_model: ClassVar[bool] = False

    def __init__(self, context: Context, **keys: Any):
        self.settings, self.annotators = _parse_keys(keys)
        settings = self.settings
        folder = context.cache / "judge"
        self.client = ChatClient(settings.client, folder, "judge.client", settings.attempts, settings.reask_temperature)
        self.report: dict[str, float] = {}

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Check the configuration before anything is built: prompts, packages, address and API key.

        Raises:
            ConfigError: One of them is missing or malformed.
        """
        settings, _ = _parse_keys(keys)
        check_client(settings.client, "judge.client")
        check_sampling(settings.sampling, "judge.sampling")
        for name, one in settings.pool.items():
            check_sampling(one.sampling, f"judge.pool.{name}.sampling")

    @classmethod
    def files(cls, keys: Mapping[str, Any]) -> list[Path]:
        """Return the files whose contents affect the verdicts: the user's own prompts.

        Together with `endpoint_identity(client)` and all keys outside of `client`, they determine the verdicts. Prices
        affect only `judge/cost`.
        """
        return user_files([one.prompt for one in _parse_keys(keys)[0].pool.values()])

    @classmethod
    def ping(cls, keys: Mapping[str, Any]) -> None:
        """Check that the endpoint answers, if `client.ping` is true.

        Raises:
            ConfigError: It does not answer.
        """
        client = _parse_keys(keys)[0].client
        if client.ping:
            Endpoint(client, "judge.client").ping()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        """Compare each response with its reference output.

        Returns:
            1 for a win, ½ for a draw, 0 for a loss, a value in between for several votes, and None if no answer could
            be read.

        Raises:
            ConfigError: The endpoint refuses all requests, or not a single answer could be read.
            Interrupted: The endpoint cannot be reached. Answers received so far are kept.
        """
        # 1. Ask every annotator of every pair, in every order.
        questions = [
            (index, annotator.weight, ours_first, self._request(annotator, row, response, ours_first))
            for index, (row, response) in enumerate(zip(prompts, responses, strict=True))
            for annotator in self._annotators_of(row.prompt)
            for ours_first in self._orders_of(row.prompt)
        ]
        answers = self.client.ask_all([request for *_, request in questions])
        # 2. Average the votes by weight, with outcomes turned round where the reference output was shown first.
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
        """Return the annotators that vote: all of them, or one drawn by weight."""
        if self.settings.vote == "all":
            return self.annotators
        point = uniform_from_hash(self.settings.seed, "annotator", prompt) * sum(one.weight for one in self.annotators)
        for annotator in self.annotators:
            point -= annotator.weight
            if point < 0:
                return [annotator]
        return [self.annotators[-1]]  # only if rounding leaves a remainder

    def _orders_of(self, prompt: str) -> tuple[bool, ...]:
        """Return whether the response is shown before the reference output: one order, or both."""
        if self.settings.order == "both":
            return (True, False)
        return (uniform_from_hash(self.settings.seed, "order", prompt) < 0.5,)

    @staticmethod
    def _request(annotator: Annotator, row: Prompt, response: str, ours_first: bool) -> Request:
        shown = (response, row.reference_output) if ours_first else (row.reference_output, response)
        return annotator.request(instruction_or_prompt(row), *shown)


def verdict_parser(pattern: str, key: str) -> Callable[[str], float | None]:
    """Return a function that reads an outcome from an answer's text.

    The pattern's group must match one of the words of `OUTCOMES`. If it matches nothing, or matches with different
    meanings, the answer cannot be read and the outcome is None.

    Args:
        pattern: A regular expression with exactly one group.
        key: The configuration key of the pattern, for error messages.

    Raises:
        ConfigError: The pattern is not a regular expression, or does not have exactly one group.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}={pattern} is not a regular expression: {error}") from None
    if expression.groups != 1:
        raise ConfigError(f"{key}={pattern} must have exactly one group, which matches one of {', '.join(OUTCOMES)}")

    def parse(text: str) -> float | None:
        outcomes = {OUTCOMES.get(word.lower()) for word in expression.findall(text)}
        return outcomes.pop() if len(outcomes) == 1 else None

    return parse


def _parse_keys(keys: Mapping[str, Any]) -> tuple[PoolSettings, list[Annotator]]:
    """Return the checked settings and the annotators of the pool; raises ConfigError."""
    settings = typed(PoolSettings, {key: value for key, value in keys.items() if key != "_target_"}, "judge.")
    if not settings.pool:
        raise ConfigError("judge.pool is empty; allowed: at least one annotator with a prompt")
    return settings, [_make_annotator(settings, name, one) for name, one in settings.pool.items()]


def _make_annotator(settings: PoolSettings, name: str, one: AnnotatorSettings) -> Annotator:
    """Fill in the pool's values where the annotator has none of its own."""
    key = f"judge.pool.{name}"
    model = settings.models.get(one.model, one.model) if one.model else settings.model
    if not model:
        raise ConfigError(f"{key}.model has no value; allowed: the name of a model at the endpoint")
    return Annotator(
        load_template(one.prompt, PLACEHOLDERS, f"{key}.prompt"),
        one.weight,
        model,
        {**settings.sampling, **one.sampling},
        one.price or settings.price,
        verdict_parser(one.answer or settings.answer, f"{key}.answer" if one.answer else "judge.answer"),
    )
