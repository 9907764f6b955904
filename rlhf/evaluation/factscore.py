"""`evaluation=factscore`: FActScore (Min et al. 2023), the share of a response's facts that a page supports.

Each response about an entity is split into sentences and those, by a language model, into atomic facts; each fact is
checked by a language model against the passages of the entity's own page that fit it best.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.data.records import Prompt
from rlhf.data.templates import Template
from rlhf.errors import ConfigError
from rlhf.evaluation.abstention import abstains
from rlhf.evaluation.client import ChatClient
from rlhf.evaluation.endpoint import (
    ClientSettings,
    Endpoint,
    Price,
    Request,
    check_client,
    check_package,
    check_sampling,
)
from rlhf.evaluation.knowledge import Knowledge, read_entities, sentences
from rlhf.evaluation.prompts import load_template, own_files
from rlhf.schema import at_least_zero, positive, typed

KEY = "evaluation.factscore"
PLAIN = re.compile(r"(?i)\W*(?:answer\W+)?(true|false)\b(?=\W*$|\W*[,*)\]—–-]|\s+(?:because|since|as)\b)")
TRUTH = re.compile(r"(?i)\b(true|false|untrue)\b")
CLAUSE = re.compile(r"(?i),\s*(?:so|but|and|hence|therefore|thus)\b|\b(?:but|because|since)\b")
NEGATION = re.compile(
    r"(?i)\b(?:not?|never|cannot|neither|nor|nothing|nobody|hardly|unable|unlikely|fails?|far from|without|contrary"
    r"|unverifiable|unsupported|doubt\w*)\b|n't\b"
)
HEDGE = re.compile(
    r"(?i)\b(?:if|whether|may|might|could|would|perhaps|probably|possibly|likely|seems?|partly|partially|partial|half|mostly"
    r"|unclear|unknown|either|not only)\b"
)
FACTS = r"(?:(?:atomic|independent|factual|verifiable|checkable|such)\s+)*(?:facts?|claims?|statements?|information)"
NO_FACTS = re.compile(
    rf"(?i)\W*(?:none|nothing|n/?a|"
    rf"(?:(?:there (?:are|is)|(?:the|this) (?:sentence|text) (?:contains|states|has|makes)) )?"
    rf"(?:no|not any) {FACTS}(?: (?:(?:is|are) )?(?:stated|found|given|present|made))?"
    r"(?: (?:here|in (?:it|(?:this|the) (?:sentence|text))))?)\W*"
)
SPLIT, CHECK = {"entity", "sentence"}, {"entity", "passages", "fact"}


@dataclass
class FactScoreSettings:
    """`conf/evaluation/factscore.yaml` says what each key means."""

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
    """One atomic fact and whether the page supports it; None where no answer could be read."""

    text: str
    supported: bool | None


class FactScore:
    """Makes the prompts of an evaluation and scores the answers.

    Raises:
        ConfigError: a key, a package, an address or an expression is wrong.
        DataError: the entities or their pages cannot be read.
    """

    def __init__(self, cache: Path, **keys: Any):
        self.settings = settings = _read(keys)
        self.entities = read_entities(Path(settings.entities).expanduser())
        pages = Path(settings.knowledge).expanduser() if settings.knowledge else None
        self.knowledge = Knowledge(self.entities, pages, settings.passage_words)
        self.split = load_template(settings.split_prompt, SPLIT, f"{KEY}.split_prompt")
        self.supports = load_template(settings.check_prompt, CHECK, f"{KEY}.check_prompt")
        self.client = ChatClient(
            settings.client, cache / "judge", f"{KEY}.client", settings.attempts, settings.reask_temperature
        )

    @classmethod
    def check(cls, keys: Mapping[str, Any]) -> None:
        """See before any model is loaded whether files, packages, addresses and keys are there.

        Raises:
            ConfigError, DataError: one of them is not.
        """
        settings = _read(keys)
        check_client(settings.client, f"{KEY}.client")
        check_sampling(settings.sampling, f"{KEY}.sampling")
        for package in ("bm25s", "pysbd"):
            check_package(package, KEY)
        entities = read_entities(Path(settings.entities).expanduser())
        Knowledge(entities, Path(settings.knowledge).expanduser() if settings.knowledge else None, 1)
        load_template(settings.split_prompt, SPLIT, f"{KEY}.split_prompt")
        load_template(settings.check_prompt, CHECK, f"{KEY}.check_prompt")

    @classmethod
    def files(cls, keys: Mapping[str, Any]) -> list[Path]:
        """The files whose contents decide the scores: entities, pages, and prompts that are not the project's own.

        With `answering(client)` and all keys beside `client` they decide them; prices change `judge/cost` alone.
        """
        settings = _read(keys)
        data = [settings.entities, *([settings.knowledge] if settings.knowledge else [])]
        return [*own_files([settings.split_prompt, settings.check_prompt]), *(Path(one).expanduser() for one in data)]

    @classmethod
    def ping(cls, keys: Mapping[str, Any]) -> None:
        """See whether the endpoint answers, if `client.ping` says so.

        Raises:
            ConfigError: it does not.
        """
        client = _read(keys).client
        if client.ping:
            Endpoint(client, f"{KEY}.client").ping()

    def prompts(self, template: Template | None) -> list[Prompt]:
        """What the policy is asked, one prompt an entity, in the template of the data set if it has one."""
        asked = [self.settings.prompt.replace("{entity}", entity.name) for entity in self.entities]
        return [Prompt(template.render(text) if template else text, instruction=text) for text in asked]

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(metrics, a record per response), for the first so many of the prompts.

        `eval/factual_precision` is FActScore without, `eval/factscore` with the length penalty; both and
        `eval/facts_per_response` are means over the responses with facts, whose share is `eval/responding_ratio`.

        Raises:
            ConfigError: the endpoint refuses the requests, or not a single fact was found and checked.
            Interrupted: the endpoint is out; what was judged is kept.
        """
        names = [entity.name for entity in self.entities[: len(prompts)]]
        texts = self._facts(names, responses)
        facts = self._checked(names, texts)
        records = [self._record(response, row) for response, row in zip(responses, facts, strict=True)]
        usage = self.client.take_usage().metrics()
        stated = [record["stated"] for record in records if record["stated"]]
        checked = [record for record in records if record["precision"] is not None]
        if not checked and any(self._answers(response) for response in responses):
            raise ConfigError(
                f"{KEY}: not one fact of {len(responses)} responses could be found and checked; look at the prompts,"
                f" {KEY}.sampling.max_tokens and the model"
            )
        metrics = {"eval/responding_ratio": len(stated) / len(records), **usage}
        if checked:
            metrics["eval/factual_precision"] = statistics.fmean(record["precision"] for record in checked)
            metrics["eval/factscore"] = statistics.fmean(record["factscore"] for record in checked)
            metrics["eval/facts_per_response"] = statistics.fmean(stated)
        metrics["judge/unjudged"] = sum(fact.supported is None for row in facts for fact in row)
        return metrics, records

    def _answers(self, response: str) -> bool:
        phrases = self.settings.abstention
        silent = abstains(response) if phrases is None else any(re.search(phrase, response) for phrase in phrases)
        return bool(response.strip()) and not silent

    def _facts(self, entities: Sequence[str], responses: Sequence[str]) -> list[list[str]]:
        """The atomic facts of each response, each once; none of an abstention."""
        parts = [
            (index, sentence)
            for index, response in enumerate(responses)
            for sentence in (sentences(response) if self._answers(response) else [])
        ]
        requests = [
            self._request(self.split.render(entity=entities[index], sentence=sentence), read_facts)
            for index, sentence in parts
        ]
        facts: list[list[str]] = [[] for _ in responses]
        for (index, _), found in zip(parts, self.client.ask_all(requests), strict=True):
            facts[index] += found or []
        return [list(dict.fromkeys(row)) for row in facts]

    def _checked(self, entities: Sequence[str], facts: Sequence[Sequence[str]]) -> list[list[Fact]]:
        requests = [
            self._request(
                self.supports.render(entity=entity, passages=self._passages(entity, fact), fact=fact), read_truth
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
        """Of one response; a fact without a readable verdict is stated, but neither supported nor not."""
        said = [fact.supported for fact in facts if fact.supported is not None]
        precision = sum(said) / len(said) if said else None
        marks = {True: "+", False: "-", None: "?"}
        return {
            "stated": len(facts) or None,
            "supported": sum(said) if said else None,
            "precision": precision,
            "factscore": None if precision is None else precision * length_penalty(len(facts), self.settings.gamma),
            "abstained": not self._answers(response),
            "facts": "\n".join(f"{marks[fact.supported]} {fact.text}" for fact in facts),
        }


def length_penalty(facts: int, gamma: float) -> float:
    """exp(1 − γ/n) for n < γ facts, else 1, as in the published code (γ = 10); 1 with γ = 0."""
    return math.exp(1 - gamma / facts) if facts < gamma else 1.0


def read_facts(text: str) -> list[str] | None:
    """The items of a list with dashes, stars or numbers; [] for "none", "no facts" and the like, else None.

    An item that says there are none is no fact.
    """
    found = re.findall(r"^\s*(?:[-–*•+]|\d+[.)])\s+(.+?)\s*$", text, re.MULTILINE)
    if found:
        return [item for item in found if not NO_FACTS.fullmatch(item)]
    return [] if NO_FACTS.fullmatch(text) else None


def read_truth(text: str) -> bool | None:
    """Whether an answer says true or false; None if it says neither, both, or hedges.

    A verdict at the start is taken as it stands. Elsewhere, "true" in one clause with a word that negates is false;
    a hedge, a negated "false", and a word that negates in another clause of the sentence leave the answer unreadable.
    """
    said = set()
    for place, sentence in enumerate(re.split(r"[.!?;:\n]+", text.replace("’", "'"))):
        if place == 0 and (plain := PLAIN.match(sentence)):
            said.add(plain[1].lower() == "true")
            sentence = sentence[plain.end() :]
        said |= {_verdict(clause, sentence) for clause in CLAUSE.split(sentence) if TRUTH.search(clause)}
    return said.pop() if len(said) == 1 else None


def _verdict(clause: str, sentence: str) -> bool | None:
    words = {word.lower() for word in TRUTH.findall(clause)}
    if len(words) > 1 or HEDGE.search(clause):
        return None
    if words != {"true"}:
        return None if NEGATION.search(clause) else False
    if NEGATION.search(clause):
        return False
    return None if NEGATION.search(sentence) else True


def _read(keys: Mapping[str, Any]) -> FactScoreSettings:
    settings = typed(FactScoreSettings, {key: value for key, value in keys.items() if key != "_target_"}, f"{KEY}.")
    if not settings.model:
        raise ConfigError(f"{KEY}.model has no value; allowed: the name under which the endpoint knows a model")
    if "{entity}" not in settings.prompt:
        raise ConfigError(f"{KEY}.prompt={settings.prompt} must hold {{entity}}")
    for phrase in settings.abstention or []:
        try:
            re.compile(phrase)
        except re.error as error:
            raise ConfigError(f"{KEY}.abstention: {phrase} is no regular expression: {error}") from None
    return settings
