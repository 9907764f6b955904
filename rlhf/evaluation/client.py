"""Asking an endpoint many things: a limit on concurrency, a persistent cache, unparsable answers, tokens and cost.

Every answer is stored the moment it arrives, so a stopped evaluation goes on where it was.
"""

import hashlib
import json
import logging
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, EndpointRefused
from rlhf.evaluation.endpoint import ClientSettings, Endpoint, Request, answering

log = logging.getLogger(__name__)
ALL_REFUSED = 20  # refusals without a single answer after which no other question is asked
TAGS = r"think|thinking|thought|reasoning"
THOUGHTS = re.compile(rf"(?is)^.*(?:</(?:{TAGS})>|\[/think\]|◁/think▷)")
UNFINISHED = re.compile(rf"(?is)^\s*(?:<(?:{TAGS})>|\[think\]|◁think▷).*")


@dataclass
class Usage:
    """Sums over answers; `refused` counts questions.

    `cost` (US dollars) counts cached answers too, `paid` only those that were asked now.
    """

    answers: int = 0
    from_cache: int = 0
    unparsable: int = 0
    refused: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    paid: float = 0.0

    def metrics(self) -> dict[str, float]:
        """As `judge/*`."""
        return {f"judge/{key}": value for key, value in vars(self).items()}


class ChatClient:
    """`ask` and `ask_all` return answers as the requests parse them, None where none could be parsed or was given.

    What the endpoint refuses to answer (a content filter, a text that is too long) is counted, logged and left out,
    unless it has refused everything so far. An unparsable answer is counted and asked again, `attempts` times in all,
    from the second time on at `reask_temperature` (a judge at temperature 0 would say the same again), or at its own
    if it takes no other. Several processes may share the cache, in which a question is known by who answers, model,
    messages, sampling and repetition.

    Raises:
        ConfigError: a package or the key is missing, the cache cannot be written, or the endpoint refuses all requests
            or a key of `sampling`.
        Interrupted: the endpoint cannot be reached, or fails, after all retries.
    """

    def __init__(
        self, settings: ClientSettings, folder: Path, key: str, attempts: int = 3, reask_temperature: float = 0.7
    ):
        self.settings, self.attempts, self.reask_temperature = settings, attempts, reask_temperature
        self.endpoint, self.key = Endpoint(settings, key), key
        self.place = answering(vars(settings))
        self.usage = Usage()
        self._answered = False
        self._own_temperature = False  # the judge takes no other
        self._refusals: Counter[str] = Counter()
        self._lock = threading.Lock()
        import diskcache

        # the default policy would throw away the oldest answers beyond 1 GB, but they were paid for
        place = str(settings.cache or folder)
        try:
            self._cache = diskcache.Cache(place, eviction_policy="none")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{key}.cache={place} cannot be written ({error}); allowed: a folder of your own"
            ) from None

    def ask_all(self, requests: Sequence[Request]) -> list[Any]:
        """The answers in the order of the requests, `settings.concurrency` of them under way at a time.

        After a failure no other request is begun; what is under way is waited for and stored.
        """
        stop = threading.Event()

        def ask(request: Request) -> Any:
            if stop.is_set():
                return None
            try:
                return self.ask(request)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = [pool.submit(ask, request) for request in requests]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()  # also on an interruption by hand
                pool.shutdown(wait=True, cancel_futures=True)
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        answers = [future.result() for future in failed or futures]
        if self._refusals and not self._answered:
            raise self._all_refused()
        for reason, times in self._refusals.items():
            log.warning(
                "%s: refused %d of %d questions, which are left out: %s", self.key, times, len(requests), reason
            )
        self._refusals.clear()
        return answers

    def ask(self, request: Request) -> Any:
        """One answer, parsed."""
        try:
            for repeat in range(self.attempts):
                text = self._answer_again(request, repeat) if repeat else self._answer(request, repeat)
                value = None if text is None else request.parse(spoken(text))
                if value is not None:
                    return value
                with self._lock:
                    self.usage.unparsable += 1
        except EndpointRefused as refused:
            self._count(request, refused)
        return None

    def _answer_again(self, request: Request, repeat: int) -> str | None:
        """At the temperature of re-asking; at the request's own if the judge takes no other."""
        if not self._own_temperature:
            try:
                warmer = {**request.sampling, "temperature": self.reask_temperature}
                return self._answer(replace(request, sampling=warmer), repeat)
            except EndpointRefused as refused:
                if refused.parameter != "temperature":
                    raise
                self._own_temperature = True
        return self._answer(request, repeat)

    def _count(self, request: Request, refused: EndpointRefused) -> None:
        """Count a refusal.

        Raises:
            ConfigError: it concerns a key of `sampling`, or everything so far was refused.
        """
        if refused.parameter:
            key = f"{self.key.removesuffix('.client')}.sampling.{refused.parameter}"
            value = request.sampling.get(refused.parameter)
            raise ConfigError(f"{key}={value} is refused by {request.model}: {refused}; null leaves it out")
        with self._lock:
            self.usage.refused += 1
            self._refusals[str(refused)] += 1
            hopeless = not self._answered and self._refusals.total() >= ALL_REFUSED
        if hopeless:
            raise self._all_refused()

    def _all_refused(self) -> ConfigError:
        reason, _ = self._refusals.most_common(1)[0]
        return ConfigError(f"{self.key}: the endpoint refuses all of {self._refusals.total()} requests: {reason}")

    def take_usage(self) -> Usage:
        """What was used since the last call."""
        with self._lock:
            usage, self.usage = self.usage, Usage()
        return usage

    def _answer(self, request: Request, repeat: int) -> str | None:
        """The text, from the cache or from the endpoint; what is no chat completion is not stored."""
        key = digest(request, repeat, self.place)
        stored = self._cache.get(key, retry=True)
        answer = self.endpoint.fetch(request) if stored is None else json.loads(stored)
        if answer is None:
            return None
        if stored is None:
            self._cache.set(key, json.dumps(answer), retry=True)
        cost = (answer["input_tokens"] * request.price.input + answer["output_tokens"] * request.price.output) / 1e6
        with self._lock:
            self._answered = True
            self.usage.answers += 1
            self.usage.from_cache += stored is not None
            self.usage.input_tokens += answer["input_tokens"]
            self.usage.output_tokens += answer["output_tokens"]
            self.usage.cost += cost
            self.usage.paid += cost if stored is None else 0.0
        return answer["text"]


def spoken(text: str) -> str:
    """An answer without the thoughts that a reasoning model puts before it; nothing if it never got beyond them."""
    return UNFINISHED.sub("", THOUGHTS.sub("", text))


def digest(request: Request, repeat: int, place: str = "") -> str:
    """Of all that determines an answer: who answers, model, messages, sampling, and which repetition it is."""
    content = [request.model, request.messages, request.sampling, repeat, *([place] if place else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def uniform(seed: int, purpose: str, text: str) -> float:
    """A number from [0, 1) that depends on nothing but these, on any machine."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
