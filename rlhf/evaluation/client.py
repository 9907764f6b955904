"""Asking an endpoint many things: a limit on concurrency, a persistent cache, unparsable answers, tokens and cost.

Every answer is stored the moment it arrives, so a stopped evaluation goes on where it was.
"""

import hashlib
import json
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.evaluation.endpoint import ClientSettings, Endpoint, Request
from rlhf.settings import ConfigError


@dataclass
class Usage:
    """Sums over answers: `cost` (US dollars) counts cached answers too, `paid` only those that were asked now."""

    answers: int = 0
    from_cache: int = 0
    unparsable: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    paid: float = 0.0

    def metrics(self) -> dict[str, float]:
        """As `judge/*`."""
        return {f"judge/{key}": value for key, value in vars(self).items()}


class ChatClient:
    """`ask` and `ask_all` return answers as the requests parse them, None where none could be parsed.

    An unparsable answer is counted and asked again, `attempts` times in all, from the second time on at
    `reask_temperature` (a judge at temperature 0 would say the same again). Several processes may share the cache, in
    which a question is known by its model, messages, sampling and repetition: endpoints that serve different models
    under one name need a cache each.

    Raises:
        ConfigError: a package or the key is missing, the cache cannot be written, or the endpoint refuses a request for
            good.
        Interrupted: the endpoint cannot be reached, or fails, after all retries.
    """

    def __init__(
        self, settings: ClientSettings, folder: Path, key: str, attempts: int = 3, reask_temperature: float = 0.7
    ):
        self.settings, self.attempts, self.reask_temperature = settings, attempts, reask_temperature
        self.endpoint = Endpoint(settings, key)
        self.usage = Usage()
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
        return [future.result() for future in failed or futures]

    def ask(self, request: Request) -> Any:
        """One answer, parsed."""
        for repeat in range(self.attempts):
            again = {"temperature": self.reask_temperature} if repeat else {}
            text = self._answer(replace(request, sampling={**request.sampling, **again}), repeat)
            value = None if text is None else request.parse(text)
            if value is not None:
                return value
            with self._lock:
                self.usage.unparsable += 1
        return None

    def take_usage(self) -> Usage:
        """What was used since the last call."""
        with self._lock:
            usage, self.usage = self.usage, Usage()
        return usage

    def _answer(self, request: Request, repeat: int) -> str | None:
        """The text, from the cache or from the endpoint; what is no chat completion is not stored."""
        key = digest(request, repeat)
        stored = self._cache.get(key, retry=True)
        answer = self.endpoint.fetch(request) if stored is None else json.loads(stored)
        if answer is None:
            return None
        if stored is None:
            self._cache.set(key, json.dumps(answer), retry=True)
        cost = (answer["input_tokens"] * request.price.input + answer["output_tokens"] * request.price.output) / 1e6
        with self._lock:
            self.usage.answers += 1
            self.usage.from_cache += stored is not None
            self.usage.input_tokens += answer["input_tokens"]
            self.usage.output_tokens += answer["output_tokens"]
            self.usage.cost += cost
            self.usage.paid += cost if stored is None else 0.0
        return answer["text"]


def digest(request: Request, repeat: int) -> str:
    """Of all that determines an answer: model, messages, sampling, and which repetition it is."""
    content = [request.model, request.messages, request.sampling, repeat]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def uniform(seed: int, purpose: str, text: str) -> float:
    """A number from [0, 1) that depends on nothing but these, on any machine."""
    digest = hashlib.sha256(f"{seed}\n{purpose}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
