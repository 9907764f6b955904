"""Asks an endpoint many questions: concurrency, a persistent cache, unreadable answers, tokens and cost.

Every answer is stored as soon as it arrives, so that an interrupted evaluation continues where it stopped.
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
from rlhf.evaluation.client_settings import ClientSettings, endpoint_identity
from rlhf.evaluation.endpoint import Endpoint, Request

log = logging.getLogger(__name__)
MAX_REFUSALS_WITHOUT_ANSWER = 20  # after so many refusals and not one answer, the client gives up
REASONING_TAGS = r"think|thinking|thought|reasoning"
REASONING = re.compile(rf"(?is)^.*(?:</(?:{REASONING_TAGS})>|\[/think\]|◁/think▷)")
UNFINISHED_REASONING = re.compile(rf"(?is)^\s*(?:<(?:{REASONING_TAGS})>|\[think\]|◁think▷).*")


@dataclass
class Usage:
    """What a client used.

    Attributes:
        answers: Completions, including those that could not be read.
        from_cache: How many of them came from the cache.
        unparsable: Answers that could not be read.
        refused: Questions that the endpoint refused.
        input_tokens: Sum over all answers.
        output_tokens: Sum over all answers.
        cost: Price in US dollars of all answers, including those from the cache.
        paid: Price in US dollars of the answers that were requested now.
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
        """Return the sums as metrics `judge/*`."""
        return {f"judge/{key}": value for key, value in vars(self).items()}


class ChatClient:
    """Asks an endpoint questions and parses the answers.

    A question that the endpoint refuses (a content filter, a text that is too long) is counted, logged and left out. An
    answer that cannot be parsed is counted and requested again, up to `attempts` times in all. From the second time on,
    requests use `reask_temperature`, because a model at temperature 0 would repeat itself; if the model does not accept
    that temperature, they use their own.

    Several processes may share the cache. Its keys are made of the endpoint, model, messages, sampling and repetition.

    Args:
        settings: The endpoint.
        folder: Where answers are cached, unless `settings.cache` names another folder.
        key: The configuration key of the settings, for error messages.
        attempts: How often a question is asked in all while its answers cannot be read.
        reask_temperature: The temperature from the second time on.

    Raises:
        ConfigError: A package or the API key is missing, or the cache cannot be written.
    """

    def __init__(
        self, settings: ClientSettings, folder: Path, key: str, attempts: int = 3, reask_temperature: float = 0.7
    ):
        self.settings, self.attempts, self.reask_temperature = settings, attempts, reask_temperature
        self.endpoint, self.key = Endpoint(settings, key), key
        self.endpoint_identity = endpoint_identity(vars(settings))
        self.usage = Usage()
        self._answered = False  # whether any answer has been received
        self._keeps_temperature = False  # whether the model refused `reask_temperature`
        self._refusals: Counter[str] = Counter()  # by reason
        self._lock = threading.Lock()
        import diskcache

        path = str(settings.cache or folder)
        try:
            # The default policy evicts the oldest answers beyond 1 GB, but they were paid for.
            self._cache = diskcache.Cache(path, eviction_policy="none")
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"{key}.cache={path} cannot be written ({error}); allowed: a folder of your own"
            ) from None

    def ask_all(self, requests: Sequence[Request]) -> list[Any]:
        """Ask all questions, `settings.concurrency` at a time.

        After a failure no further request is started; those in flight are awaited and stored.

        Returns:
            The parsed answers in the order of the requests. None where the endpoint refused the question or no answer
            could be read.

        Raises:
            ConfigError: The endpoint refuses all requests, or a key of `sampling`.
            Interrupted: The endpoint cannot be reached or fails, after all retries.
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
                stop.set()  # also on Ctrl-C
                pool.shutdown(wait=True, cancel_futures=True)
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        answers = [future.result() for future in failed or futures]  # raises the first exception, if there is one
        if self._refusals and not self._answered:
            raise self._all_refused()
        for reason, times in self._refusals.items():
            log.warning(
                "%s: refused %d of %d questions, which are left out: %s", self.key, times, len(requests), reason
            )
        self._refusals.clear()
        return answers

    def ask(self, request: Request) -> Any:
        """Ask one question. Returns and raises as `ask_all` does."""
        try:
            for repeat in range(self.attempts):
                text = self._ask_again(request, repeat) if repeat else self._complete(request, repeat)
                value = None if text is None else request.parse(without_reasoning(text))
                if value is not None:
                    return value
                with self._lock:
                    self.usage.unparsable += 1
        except EndpointRefused as refusal:
            self._count_refusal(request, refusal)
        return None

    def _ask_again(self, request: Request, repeat: int) -> str | None:
        """Complete a request at `reask_temperature`, or at its own temperature if the model accepts no other."""
        if not self._keeps_temperature:
            try:
                warmer = {**request.sampling, "temperature": self.reask_temperature}
                return self._complete(replace(request, sampling=warmer), repeat)
            except EndpointRefused as refusal:
                if refusal.parameter != "temperature":
                    raise
                self._keeps_temperature = True
        return self._complete(request, repeat)

    def _count_refusal(self, request: Request, refusal: EndpointRefused) -> None:
        """Count a refused question.

        Raises:
            ConfigError: The refusal concerns a key of `sampling`, or all of many questions so far were refused.
        """
        if refusal.parameter:
            key = f"{self.key.removesuffix('.client')}.sampling.{refusal.parameter}"
            value = request.sampling.get(refusal.parameter)
            raise ConfigError(f"{key}={value} is refused by {request.model}: {refusal}; null leaves it out")
        with self._lock:
            self.usage.refused += 1
            self._refusals[str(refusal)] += 1
            hopeless = not self._answered and self._refusals.total() >= MAX_REFUSALS_WITHOUT_ANSWER
        if hopeless:
            raise self._all_refused()

    def _all_refused(self) -> ConfigError:
        reason, _ = self._refusals.most_common(1)[0]
        return ConfigError(f"{self.key}: the endpoint refuses all of {self._refusals.total()} requests: {reason}")

    def take_usage(self) -> Usage:
        """Return what was used since the last call, and start counting anew."""
        with self._lock:
            usage, self.usage = self.usage, Usage()
        return usage

    def _complete(self, request: Request, repeat: int) -> str | None:
        """Return the text of an answer from the cache or the endpoint, None if it is not a chat completion."""
        key = cache_key(request, repeat, self.endpoint_identity)
        cached = self._cache.get(key, retry=True)
        answer = self.endpoint.fetch(request) if cached is None else json.loads(cached)
        if answer is None:
            return None
        if cached is None:
            self._cache.set(key, json.dumps(answer), retry=True)
        cost = (answer["input_tokens"] * request.price.input + answer["output_tokens"] * request.price.output) / 1e6
        with self._lock:
            self._answered = True
            self.usage.answers += 1
            self.usage.from_cache += cached is not None
            self.usage.input_tokens += answer["input_tokens"]
            self.usage.output_tokens += answer["output_tokens"]
            self.usage.cost += cost
            self.usage.paid += cost if cached is None else 0.0
        return answer["text"]


def without_reasoning(text: str) -> str:
    """Remove the thoughts that a reasoning model writes before its answer; "" if it never got beyond them."""
    return UNFINISHED_REASONING.sub("", REASONING.sub("", text))


def cache_key(request: Request, repeat: int, endpoint: str = "") -> str:
    """Return the SHA-256 of what determines an answer: the endpoint, model, messages, sampling and repetition."""
    content = [request.model, request.messages, request.sampling, repeat, *([endpoint] if endpoint else [])]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def uniform_from_hash(seed: int, purpose: str, text: str) -> float:
    """Return a pseudo-random number in [0, 1) that depends on the arguments alone, and is the same on any machine."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
