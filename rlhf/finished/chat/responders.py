"""Answers of a run to a prompt, token by token, with their scores."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import DynamicCache, PreTrainedTokenizerBase

from rlhf.data.options import parse_template
from rlhf.data.records import DataSource
from rlhf.errors import DataError, RunError
from rlhf.finished.chat.models import LoadedRole, ModelCache
from rlhf.finished.chat.rewards import reward_of
from rlhf.finished.run import FinishedRun
from rlhf.models.tokenizing import Response, chat_template_of, encode, keep_template
from rlhf.models.tokens import stop_ids
from rlhf.pipeline.config import data_source
from rlhf.report.text import count
from rlhf.rollout.kv_cache import cache_argument

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer so far.

    Once it is `done` it has `scores`, by name, and if there should be a reward but is none, the reason (`unscored`).
    """

    text: str = ""
    tokens: int = 0
    done: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    unscored: str = ""

    @property
    def note(self) -> str:
        """Scores and length on one line, and why there is no reward."""
        scores = [f"{name} {value:.2f}" for name, value in self.scores.items()]
        reason = f"; no reward: {self.unscored}" if self.unscored else ""
        return ", ".join([*scores, count(self.tokens, "token")]) + reason


@dataclass
class Sampling:
    """How to sample; None stands for the setting of each run's evaluation. Temperature 0 is greedy decoding."""

    temperature: float | None = None
    max_new_tokens: int | None = None


class Responder:
    """Answers prompts with the policy of a finished run.

    With a chat template, prompts are the turns of a conversation (`forget` begins another). Otherwise every prompt
    stands alone, because the run's template has no place for earlier turns. Each responder has a conversation and a
    random generator of its own, so its answers do not depend on the other runs in the chat.
    """

    def __init__(self, run: FinishedRun, label: str, models: ModelCache, scored: bool):
        self.label, self.settings, self.evaluation = label, run.settings, run.config["evaluation"]
        self.policy: LoadedRole = models.policy(run)
        source = data_source(OmegaConf.create({"data": run.data}))
        self.tokenizer: PreTrainedTokenizerBase = keep_template(run.tokenizer(), source)
        self.stops = stop_ids(self.tokenizer, self.policy.roles.trunk(self.policy.role))
        self.chat = chat_template_of(self.tokenizer)
        self.conversation: list[dict[str, str]] = []  # with a chat template: the turns so far
        self.render = prompt_renderer(run.data, source)
        self.utility: Callable[[str, str], float] | None = getattr(source, "utility", None) if scored else None
        self.reward = reward_of(run, label, source, models) if scored else None
        self.generator = torch.Generator()

    def answer(self, text: str, sampling: Sampling) -> Iterator[Answer]:
        """Yield the answer after every token, and once more at its end with its scores.

        Raises:
            RunError: the prompt is empty, or longer than `model.max_prompt_tokens`.
        """
        asked = {"role": "user", "content": text}
        prompt = self.chat.render_messages([*self.conversation, asked]) if self.chat else self.render(text)
        ids = encode(self.tokenizer, [prompt])[0]
        if not 0 < len(ids) <= self.settings.max_prompt_tokens:
            limit = self.settings.max_prompt_tokens
            fresh = ", or /new for another conversation" if self.conversation else ""
            raise RunError(
                f"{self.label}: the prompt has {len(ids)} tokens; allowed: 1 to {limit}, as in training{fresh}"
            )
        temperature, limit = (
            self.evaluation[name] if chosen is None else chosen for name, chosen in vars(sampling).items()
        )
        tokens: list[int] = []
        current = Answer()
        for token in sample_tokens(self.policy, ids, limit, temperature, self.generator, self.stops):
            tokens.append(token)
            # a character of several tokens decodes to U+FFFD until its last token
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")
            current = Answer(text, len(tokens))
            yield current
        if self.chat:
            self.conversation += [asked, {"role": "assistant", "content": current.text}]
        yield self._scored(current, prompt, ids, tokens)

    def forget(self) -> None:
        """Begin another conversation."""
        self.conversation = []

    def _scored(self, answer: Answer, prompt: str, ids: list[int], tokens: list[int]) -> Answer:
        """The finished answer with its reward, by what rewarded the run, and its gold utility.

        `ids` are those of the prompt, `tokens` those of the answer.
        """
        scores, unscored = {}, ""
        if self.reward is not None:
            try:
                response = Response(answer.text, tokens, tokens[-1] in self.stops)
                scores[self.reward.name] = self.reward(prompt, ids, response)
            except RunError as error:
                unscored = str(error)
        if self.utility is not None:
            try:
                scores["gold utility"] = float(self.utility(prompt, answer.text))
            except DataError as error:  # the data set cannot rate an answer to an unknown question
                log.info("%s", error)
        return replace(answer, done=True, scores=scores, unscored=unscored)


def sample_tokens(
    policy: LoadedRole,
    prompt: list[int],
    limit: int,
    temperature: float,
    generator: torch.Generator,
    stops: Collection[int],
) -> Iterator[int]:
    """Yield sampled token ids one by one: at most `limit`, up to and including the first of `stops`.

    The adapter is enabled during each forward pass only, so that several runs on one base can alternate. Temperature 0
    takes the most probable token.
    """
    roles, cache = policy.roles, DynamicCache()
    ids = torch.tensor([prompt])
    for _ in range(limit):
        with torch.no_grad(), roles.using_adapter(policy.role) as model, roles.autocast():
            argument = cache_argument(model.base_model)
            states = model.base_model(input_ids=ids.to(roles.device), use_cache=True, **{argument: cache})
            logits = roles.output(policy.role)(states.last_hidden_state[0, -1]).float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        yield token
        if token in stops:
            return
        ids = torch.tensor([[token]])


def answer_together(responders: Sequence[Responder], text: str, sampling: Sampling) -> Iterator[list[Answer]]:
    """Yield the answers of all responders whenever each unfinished one has generated another token."""
    answers = [Answer() for _ in responders]
    for step in zip_longest(*(responder.answer(text, sampling) for responder in responders)):
        answers = [new or old for new, old in zip(step, answers, strict=True)]
        yield answers


def open_responders(runs: Sequence[FinishedRun], scored: bool, seed: int) -> list[Responder]:
    """A responder for each run; models that they share are loaded once.

    Args:
        runs: runs of stage=sft, or of stages that train a policy.
        scored: also load reward models, to score the answers.
        seed: of the random generators.

    Raises:
        RunError, ConfigError, DataError, ModelError: one of the runs cannot be used.
    """
    models = ModelCache()
    labels = labels_of([run.folder.resolve() for run in runs])
    responders = [Responder(run, label, models, scored) for run, label in zip(runs, labels, strict=True)]
    reseed(responders, seed)
    return responders


def labels_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folder's name, with those above it that tell runs of different studies apart."""
    studies = {folder.parent for folder in folders if folder.parent.name != "cache"}  # whose names hold a digest
    depth = 1 if len(studies) <= 1 else 2
    deepest = max(len(folder.parts) for folder in folders)
    while depth < deepest and len({folder.parts[-depth:] for folder in folders}) < len(set(folders)):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def examples(run: FinishedRun, number: int = 5) -> list[str]:
    """The first instructions that a run was evaluated on; [] if its data cannot be read."""
    try:
        source = data_source(OmegaConf.create({"data": run.data}))
        rows = source.load("eval" if "eval" in source.splits else "prompts")
        return [rows[index]["instruction"] or rows[index]["prompt"] for index in range(min(number, len(rows)))]
    except DataError as error:
        log.warning("no examples of prompts, because the data cannot be read: %s", error)
        return []


def reseed(responders: Sequence[Responder], seed: int) -> None:
    """Reset the random generator of every responder to `seed`."""
    for responder in responders:
        responder.generator.manual_seed(seed)


def prompt_renderer(data: dict[str, Any], source: DataSource) -> Callable[[str], str]:
    """The function from what the user types to a prompt in the format of the run's data.

    Uses the data set's template if there is one. Otherwise the text around the instruction in the first prompt of the
    data is put around what is typed.
    """
    if data.get("template"):
        return parse_template(data["template"]).render
    before, after = "", ""
    try:
        row = source.load("eval" if "eval" in source.splits else "prompts")[0]
        if row["instruction"] and row["instruction"] in row["prompt"]:
            before, _, after = row["prompt"].partition(row["instruction"])
    except DataError as error:
        log.warning("prompts are used as they are typed, because the data cannot be read: %s", error)
    return lambda text: f"{before}{text}{after}"
