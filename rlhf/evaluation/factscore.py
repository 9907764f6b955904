"""`evaluation=factscore`: FActScore (Min et al. 2023), the share of a response's facts that a page supports.

A response about an entity is split into sentences. A language model splits each sentence into atomic facts, and checks
each fact against the best-matching passages of the entity's own page.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.records import Prompt
from rlhf.data.templates import PromptTemplate
from rlhf.errors import ConfigError
from rlhf.evaluation.abstention import abstains
from rlhf.evaluation.client import ChatClient
from rlhf.evaluation.client_settings import ClientSettings, Price, check_client, check_package, check_sampling
from rlhf.evaluation.endpoint import Endpoint, Request
from rlhf.evaluation.fact_answers import read_facts, read_truth
from rlhf.evaluation.knowledge import Knowledge, read_entities, split_sentences
from rlhf.evaluation.prompts import load_template, user_files
from rlhf.schema import at_least_zero, positive, typed

KEY = "evaluation.factscore"
SPLIT_PLACEHOLDERS, CHECK_PLACEHOLDERS = {"entity", "sentence"}, {"entity", "passages", "fact"}


@dataclass
class FactScoreSettings:
    """The keys of `evaluation.factscore`, documented in `conf/evaluation/factscore.yaml`."""

    entities: str
    knowledge: str | None = None
    prompt: str = "Tell me a bio of {entity}."
    model: str = ""
    split_prompt: str = "atomic_facts"
    check_prompt: str = "support"
    gamma: float = at_least_zero(10.0)
    passages: int = positive(5)
    passage_words: int = positive(180)
    abstention: list[str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    attempts: int = positive(3)
    reask_temperature: float = at_least_zero(0.7)
    price: Price = field(default_factory=Price)
    client: ClientSettings = field(default_factory=ClientSettings)


class Fact(NamedTuple):
    """An atomic fact and whether the page supports it. `supported` is None if no answer could be read."""

    text: str
    supported: bool | None


class FactScore:
    """Makes the prompts of an evaluation and scores the responses.

    Args:
        cache: The folder in whose `judge` subfolder answers are cached.
        keys: The keys of `FactScoreSettings`.

    Raises:
        ConfigError: A key, a package, an address or a regular expression is wrong.
        DataError: The entities or their pages cannot be read.
    """

    def __init__(self, cache: Path, **keys: Any):
        self.settings = settings = _parse_keys(keys)
        self.entities = read_entities(Path(settings.entities).expanduser())
        pages = Path(settings.knowledge).expanduser() if settings.knowledge else None
        self.knowledge = Knowledge(self.entities, pages, settings.passage_words)
        self.split_template = load_template(settings.split_prompt, SPLIT_PLACEHOLDERS, f"{KEY}.split_prompt")
        self.check_template = load_template(settings.check_prompt, CHECK_PLACEHOLDERS, f"{KEY}.check_prompt")
        self.client = ChatClient(
            settings.client, cache / "judge", f"{KEY}.client", settings.attempts, settings.reask_temperature
        )

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """Check the configuration before anything is built: files, packages, address and API key.

        Raises:
            ConfigError: A key, a package, an address or a regular expression is wrong.
            DataError: The entities or their pages cannot be read.
        """
        settings = _parse_keys(keys)
        check_client(settings.client, f"{KEY}.client")
        check_sampling(settings.sampling, f"{KEY}.sampling")
        for package in ("bm25s", "pysbd"):
            check_package(package, KEY)
        entities = read_entities(Path(settings.entities).expanduser())
        Knowledge(entities, Path(settings.knowledge).expanduser() if settings.knowledge else None, 1)
        load_template(settings.split_prompt, SPLIT_PLACEHOLDERS, f"{KEY}.split_prompt")
        load_template(settings.check_prompt, CHECK_PLACEHOLDERS, f"{KEY}.check_prompt")

    @classmethod
    def files(cls, keys: Mapping[str, Any]) -> list[Path]:
        """Return the files whose contents affect the scores: entities, pages, and the user's own prompts.

        Together with `endpoint_identity(client)` and all keys outside of `client`, they determine the scores. Prices
        affect only `judge/cost`.
        """
        settings = _parse_keys(keys)
        data = [settings.entities, *([settings.knowledge] if settings.knowledge else [])]
        return [*user_files([settings.split_prompt, settings.check_prompt]), *(Path(one).expanduser() for one in data)]

    @classmethod
    def ping(cls, keys: Mapping[str, Any]) -> None:
        """Check that the endpoint answers, if `client.ping` is true.

        Raises:
            ConfigError: It does not answer.
        """
        client = _parse_keys(keys).client
        if client.ping:
            Endpoint(client, f"{KEY}.client").ping()

    def prompts(self, template: PromptTemplate | None) -> list[Prompt]:
        """Return one prompt per entity, in the data set's template if it has one."""
        questions = [self.settings.prompt.replace("{entity}", entity.name) for entity in self.entities]
        return [Prompt(template.render(text) if template else text, instruction=text) for text in questions]

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Score responses.

        `eval/factscore` has the length penalty, and `eval/factual_precision` does not. Both, and
        `eval/facts_per_response`, are means over the responses with facts, whose share is `eval/responding_ratio`.

        Args:
            prompts: The first so many of the prompts that `self.prompts` made.
            responses: One response per prompt.

        Returns:
            The metrics, and a record per response.

        Raises:
            ConfigError: The endpoint refuses the requests, or not a single fact was found and checked.
            Interrupted: The endpoint cannot be reached. Answers received so far are kept.
        """
        # 1. Split the responses into facts and check each fact. These are the requests to the endpoint.
        names = [entity.name for entity in self.entities[: len(prompts)]]
        texts = self._split_into_facts(names, responses)
        facts = self._check_facts(names, texts)
        # 2. Score each response.
        records = [self._record(response, row) for response, row in zip(responses, facts, strict=True)]
        usage = self.client.take_usage().metrics()
        stated = [record["stated"] for record in records if record["stated"]]
        checked = [record for record in records if record["precision"] is not None]
        if not checked and any(self._states_facts(response) for response in responses):
            raise ConfigError(
                f"{KEY}: not one fact of {len(responses)} responses could be found and checked; look at the prompts,"
                f" {KEY}.sampling.max_tokens and the model"
            )
        # 3. Average over the responses with facts.
        metrics = {"eval/responding_ratio": len(stated) / len(records), **usage}
        if checked:
            metrics["eval/factual_precision"] = statistics.fmean(record["precision"] for record in checked)
            metrics["eval/factscore"] = statistics.fmean(record["factscore"] for record in checked)
            metrics["eval/facts_per_response"] = statistics.fmean(stated)
        metrics["judge/unjudged"] = sum(fact.supported is None for row in facts for fact in row)
        return metrics, records

    def _states_facts(self, response: str) -> bool:
        """Whether a response is neither blank nor an abstention."""
        patterns = self.settings.abstention
        abstained = abstains(response) if patterns is None else any(re.search(one, response) for one in patterns)
        return bool(response.strip()) and not abstained

    def _split_into_facts(self, entities: Sequence[str], responses: Sequence[str]) -> list[list[str]]:
        """Return the distinct atomic facts of each response; an abstention has none."""
        parts = [
            (index, sentence)
            for index, response in enumerate(responses)
            for sentence in (split_sentences(response) if self._states_facts(response) else [])
        ]
        requests = [
            self._request(self.split_template.render(entity=entities[index], sentence=sentence), read_facts)
            for index, sentence in parts
        ]
        facts: list[list[str]] = [[] for _ in responses]
        for (index, _), found in zip(parts, self.client.ask_all(requests), strict=True):
            facts[index] += found or []
        return [list(dict.fromkeys(row)) for row in facts]

    def _check_facts(self, entities: Sequence[str], facts: Sequence[Sequence[str]]) -> list[list[Fact]]:
        """Check each fact of each response against the page of its entity."""
        requests = [
            self._request(
                self.check_template.render(entity=entity, passages=self._passages(entity, fact), fact=fact), read_truth
            )
            for entity, row in zip(entities, facts, strict=True)
            for fact in row
        ]
        answers = iter(self.client.ask_all(requests))
        return [[Fact(fact, next(answers)) for fact in row] for row in facts]

    def _passages(self, entity: str, fact: str) -> str:
        return "\n\n".join(self.knowledge.passages(entity, fact, self.settings.passages))

    def _request(self, messages: list[dict[str, str]], parse: Any) -> Request:
        return Request(self.settings.model, messages, parse, self.settings.sampling, self.settings.price)

    def _record(self, response: str, facts: Sequence[Fact]) -> dict[str, Any]:
        """Return the scores of one response.

        A fact whose check could not be read counts as stated, but is left out of the precision.
        """
        verdicts = [fact.supported for fact in facts if fact.supported is not None]
        precision = sum(verdicts) / len(verdicts) if verdicts else None
        marks = {True: "+", False: "-", None: "?"}
        return {
            "stated": len(facts) or None,
            "supported": sum(verdicts) if verdicts else None,
            "precision": precision,
            "factscore": None if precision is None else precision * length_penalty(len(facts), self.settings.gamma),
            "abstained": not self._states_facts(response),
            "facts": "\n".join(f"{marks[fact.supported]} {fact.text}" for fact in facts),
        }


def length_penalty(facts: int, gamma: float) -> float:
    """Return exp(1 − γ/n) for n < γ facts and 1 otherwise, as in the published code (γ = 10). γ = 0 disables it."""
    return math.exp(1 - gamma / facts) if facts < gamma else 1.0


def _parse_keys(keys: Mapping[str, Any]) -> FactScoreSettings:
    """Return the checked settings; raises ConfigError."""
    settings = typed(FactScoreSettings, {key: value for key, value in keys.items() if key != "_target_"}, f"{KEY}.")
    if not settings.model:
        raise ConfigError(f"{KEY}.model has no value; allowed: the name of a model at the endpoint")
    if "{entity}" not in settings.prompt:
        raise ConfigError(f"{KEY}.prompt={settings.prompt} must contain {{entity}}")
    for pattern in settings.abstention or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{KEY}.abstention: {pattern} is not a regular expression: {error}") from None
    return settings
