"""What a run says to a prompt, token by token, and what its scorers think of it."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf.data.options import parse_template
from rlhf.data.records import DataSource
from rlhf.errors import DataError, RunError
from rlhf.finished.chat.models import Models, Part, score
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import encode, keep_template
from rlhf.models.tokens import stop_ids
from rlhf.pipeline.config import data_source
from rlhf.rollout.kv_cache import cache_argument

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What has been said so far; scores by name once it is `done`."""

    text: str = ""
    tokens: int = 0
    done: bool = False
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def note(self) -> str:
        """Scores and length in a line."""
        told = [f"{name} {value:.2f}" for name, value in self.scores.items()]
        return ", ".join([*told, f"{self.tokens} token{'s' * (self.tokens != 1)}"])


@dataclass
class Sampling:
    """How to sample; None is what each run was evaluated with. Temperature 0 is greedy."""

    temperature: float | None = None
    max_new_tokens: int | None = None


class Voice:
    """A run that answers prompts, each by itself: no stage is trained on conversations.

    It draws from random numbers of its own, so what it says does not depend on who else is asked.
    """

    def __init__(self, run: FinishedRun, label: str, models: Models, scored: bool):
        self.label, self.settings, self.evaluation = label, run.settings, run.config["evaluation"]
        self.policy: Part = models.policy(run)
        source = data_source(OmegaConf.create({"data": run.config["data"]}))
        self.tokenizer: PreTrainedTokenizerBase = keep_template(run.tokenizer(), source)
        self.stops = stop_ids(self.tokenizer, self.policy.roles.trunk(self.policy.role))
        self.render = template_of(run.config["data"], source)
        self.utility: Callable[[str, str], float] | None = getattr(source, "utility", None) if scored else None
        reward = run.reward if scored else None
        self.reward = models.reward(reward) if reward else None
        self.baseline = reward.metrics["reward/baseline"] if reward else 0.0
        self.generator = torch.Generator()

    def answer(self, text: str, sampling: Sampling) -> Iterator[Answer]:
        """The answer as it grows, and at last with its scores.

        Raises:
            RunError: a longer prompt than the run has seen, or an empty one.
        """
        prompt = self.render(text)
        ids = encode(self.tokenizer, [prompt])[0]
        if not 0 < len(ids) <= self.settings.max_prompt_tokens:
            limit = self.settings.max_prompt_tokens
            raise RunError(f"{self.label}: the prompt has {len(ids)} tokens; allowed: 1 to {limit}, as in training")
        temperature, most = (
            self.evaluation[name] if chosen is None else chosen for name, chosen in vars(sampling).items()
        )
        said: list[int] = []
        now = Answer()
        for token in stream(self.policy, ids, most, temperature, self.generator, self.stops):
            said.append(token)
            # half a character is shown when it is whole
            now = Answer(self.tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd"), len(said))
            yield now
        yield replace(now, done=True, scores=self._scores(prompt, ids, now.text, said))

    def _scores(self, prompt: str, ids: list[int], text: str, said: list[int]) -> dict[str, float]:
        scores = {}
        if self.reward is not None:
            scores["reward"] = score(self.reward, ids, said) - self.baseline
        if self.utility is not None:
            try:
                scores["gold utility"] = float(self.utility(prompt, text))
            except DataError as error:  # nobody there knows what the question is
                log.info("%s", error)
        return scores


def stream(
    part: Part, prompt: list[int], most: int, temperature: float, generator: torch.Generator, stops: Collection[int]
) -> Iterator[int]:
    """Sampled ids, one after the other, an EOS included. The adapter is switched on for each of them by itself.

    So several runs on one base can take turns.
    """
    roles, cache = part.roles, DynamicCache()
    ids = torch.tensor([prompt])
    for _ in range(most):
        with torch.no_grad(), roles.using_adapter(part.role) as model, roles.autocast():
            argument = cache_argument(model.base_model)
            states = model.base_model(input_ids=ids.to(roles.device), use_cache=True, **{argument: cache})
            logits = roles.output(part.role)(states.last_hidden_state[0, -1]).float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        yield token
        if token in stops:
            return
        ids = torch.tensor([[token]])


def together(voices: Sequence[Voice], text: str, sampling: Sampling) -> Iterator[list[Answer]]:
    """All answers as they grow, a token of each at a time."""
    answers = [Answer() for _ in voices]
    for step in zip_longest(*(voice.answer(text, sampling) for voice in voices)):
        answers = [new or old for new, old in zip(step, answers, strict=True)]
        yield answers


def open_voices(runs: Sequence[FinishedRun], scored: bool, seed: int) -> list[Voice]:
    """A voice for each run; what they have in common is loaded once.

    Raises:
        RunError, ConfigError, DataError, ModelError: one cannot be used.
    """
    models = Models()
    names = [run.folder.resolve().name for run in runs]
    labels = [
        name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for name, run in zip(names, runs, strict=True)
    ]
    voices = [Voice(run, label, models, scored) for run, label in zip(runs, labels, strict=True)]
    reseed(voices, seed)
    return voices


def reseed(voices: Sequence[Voice], seed: int) -> None:
    """Start everyone's random numbers again."""
    for voice in voices:
        voice.generator.manual_seed(seed)


def template_of(data: dict[str, Any], source: DataSource) -> Callable[[str], str]:
    """How what is typed becomes a prompt: by the data set's template, else as its own prompts surround instructions."""
    if data.get("template"):
        return parse_template(data["template"]).render
    before, after = "", ""
    try:
        row = source.load("eval" if "eval" in source.splits else "prompts")[0]
        if row["instruction"] and row["instruction"] in row["prompt"]:
            before, _, after = row["prompt"].partition(row["instruction"])
    except DataError as error:
        log.warning("prompts are taken as they are typed, since the data cannot be looked at: %s", error)
    return lambda text: f"{before}{text}{after}"
