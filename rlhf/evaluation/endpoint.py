"""An OpenAI-compatible endpoint: its settings, its key from the environment, and its failures in one sentence each."""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from rlhf.settings import ConfigError, Interrupted, at_least_zero, positive

log = logging.getLogger(__name__)
TRANSIENT = (408, 409, 425, 429)  # and everything from 500: another time it may work
PING_SECONDS = 10.0


@dataclass
class ClientSettings:
    """How answers are fetched. Only who gives them (`answerer`) is part of a run's identity and of the cache's keys.

    `base_url` null is the `openai` package's own choice (OpenAI, or $OPENAI_BASE_URL); `api_key_env` names an
    environment variable, null for a server without keys; `timeout` is in seconds a request; `retries` follow after
    0.5, 1, 2, 4, 8, 8 … seconds or what the server's Retry-After says; `cache` null is `<output_dir>/cache/judge`.
    `known_as` is a name for what answers, for a server whose address changes; null: the address is the name.
    """

    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout: float = positive(120.0)
    retries: int = at_least_zero(8)
    concurrency: int = positive(8)
    ping: bool = True
    cache: str | None = None
    known_as: str | None = None


def answerer(client: Mapping[str, Any]) -> str | None:
    """Who answers, as far as a client's settings say: a name, an address, or None for OpenAI itself."""
    named = client.get("known_as") or client.get("base_url") or os.environ.get("OPENAI_BASE_URL")
    return str(named).rstrip("/") if named else None


@dataclass
class Price:
    """US dollars per million tokens."""

    input: float = at_least_zero(0.0)
    output: float = at_least_zero(0.0)


@dataclass(frozen=True)
class Request:
    """One question: `sampling` is what `chat.completions.create` takes beside `model` and `messages`.

    `parse` makes a value of the answer's text, None where it cannot.
    """

    model: str
    messages: list[dict[str, str]]
    parse: Callable[[str], Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    price: Price = field(default_factory=Price)


class Endpoint:
    """The `openai` client, with its retries, whose errors are sentences; `key` is where its settings stand.

    Raises:
        ConfigError: a package or the key is missing, or the address is none.
    """

    def __init__(self, settings: ClientSettings, key: str):
        self.settings, self.key = settings, key
        self._secret = check_client(settings, key)
        for name in ("httpx", "httpx2", "openai"):  # a line per request
            logging.getLogger(name).setLevel(logging.WARNING)
        import openai

        self._client = openai.OpenAI(
            api_key=self._secret or "none",
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=settings.retries,
        )
        self._place = str(self._client.base_url).rstrip("/")

    def fetch(self, request: Request) -> dict[str, Any] | None:
        """The answer as `text`, `input_tokens` and `output_tokens`; None for what is no chat completion at all.

        Raises:
            ConfigError: the endpoint refuses the request for good.
            Interrupted: it cannot be reached, or fails, after all retries.
        """
        import openai

        options = {name: value for name, value in request.sampling.items() if value is not None}
        try:
            found: Any = self._client.chat.completions.create(model=request.model, messages=request.messages, **options)
            return {
                "text": found.choices[0].message.content or "",
                "input_tokens": getattr(found.usage, "prompt_tokens", None) or 0,
                "output_tokens": getattr(found.usage, "completion_tokens", None) or 0,
            }
        except openai.APIStatusError as error:
            if error.status_code in TRANSIENT or error.status_code >= 500:
                raise Interrupted(self._outage(f"answers {error.status_code}")) from None
            raise ConfigError(f"{self.key}: {self._place} refuses {request.model}: {self._hidden(error)}") from None
        except openai.APIConnectionError as error:  # time-outs too
            raise Interrupted(self._outage(f"gives no answer ({self._hidden(error)})")) from None
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            log.debug("%s: no chat completion: %s", self._place, type(error).__name__)
            return None

    def ping(self) -> None:
        """See whether anybody answers, by asking once for the list of models.

        Raises:
            ConfigError: nobody answers, or the key is refused.
        """
        import openai

        quick = self._client.with_options(max_retries=0, timeout=min(PING_SECONDS, self.settings.timeout))
        try:
            quick.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            name = self.settings.api_key_env
            raise ConfigError(f"{self.key}.api_key_env={name}: {self._place} refuses the key in ${name}") from None
        except openai.APIConnectionError as error:
            raise ConfigError(
                f"{self.key}.base_url: nobody answers at {self._place} ({self._hidden(error)});"
                f" {self.key}.ping=false asks only when something is to be judged"
            ) from None
        except (openai.APIError, ValueError):
            pass  # somebody is there; not every server lists its models

    def _outage(self, what: str) -> str:
        kept = "what was judged is kept, and the same command continues"
        return f"{self._place} {what} after {self.settings.retries} retries; {kept}"

    def _hidden(self, error: Exception) -> str:
        text = " ".join(str(error).split())[:300].rstrip(".")
        return text.replace(self._secret, "***") if self._secret else text


def check_client(settings: ClientSettings, key: str) -> str:
    """See before any model is loaded whether the packages, the address and the key are there; returns the key.

    Raises:
        ConfigError: naming what is missing, and never a key.
    """
    for package in ("openai", "diskcache"):
        check_package(package, key)
    if settings.base_url is not None and not _is_address(settings.base_url):
        raise ConfigError(
            f"{key}.base_url is no address; allowed: one such as http://localhost:8000/v1, without a key in it"
        )
    name = settings.api_key_env
    if name is None:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # not repeated here: it may be the key itself
        raise ConfigError(f"{key}.api_key_env is no name; allowed: that of an environment variable, or null")
    secret = os.environ.get(name, "")
    if not secret:
        raise ConfigError(f"{key}.api_key_env={name}: ${name} is not set; allowed: null for a server without keys")
    return secret


@cache
def check_package(package: str, key: str) -> None:
    """See whether an optional package is there.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{key} needs the package {package}: pip install 'rlhf[judge]'")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in url
    except ValueError:
        return False
