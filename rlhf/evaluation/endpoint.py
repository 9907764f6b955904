"""An OpenAI-compatible endpoint: its settings, its key from the environment, and its failures in one sentence each."""

import importlib.util
import inspect
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from rlhf.errors import ConfigError, EndpointRefused, Interrupted
from rlhf.schema import at_least_zero, positive

log = logging.getLogger(__name__)
TRANSIENT = (408, 409, 425, 429)  # and everything from 500: another time it may work
OF_ONE_REQUEST = (400, 413, 414, 422, 451)  # other requests may be answered; from all others on every request fails
FILTERED = re.compile(r"(?i)moderation|flagged|content.?(filter|policy|management)")
TOO_LONG = re.compile(r"(?i)context|too long|maximum.{0,30}(length|tokens)|exceed")
SECRET_LENGTH = 8  # a shorter key is a dummy ("EMPTY", "x"), whose letters may well occur in an answer
PING_SECONDS = 10.0


@dataclass
class ClientSettings:
    """How answers are fetched. Only who answers changes what they are: see `answering`.

    `name` says who answers where an address does not, such as that of a server of one's own which moves from node to
    node; `base_url` null is the `openai` package's own choice (OpenAI, or $OPENAI_BASE_URL); `api_key_env` names an
    environment variable, null for a server without keys; `timeout` is in seconds a request; `retries` follow after
    0.5, 1, 2, 4, 8, 8 … seconds or what the server's Retry-After says; `cache` null is `<output_dir>/cache/judge`.
    """

    base_url: str | None = None
    api_key_env: str | None = "OPENAI_API_KEY"
    timeout: float = positive(120.0)
    retries: int = at_least_zero(8)
    concurrency: int = positive(8)
    ping: bool = True
    cache: str | None = None
    name: str | None = None


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


def answering(client: Mapping[str, Any]) -> str:
    """Who answers, of all the keys of a `client`: its `name`, or its address; "" is OpenAI.

    Together with everything beside `client` this decides the answers. Time-outs, retries, concurrency, ping, the
    place of the cache and the name of the key's variable do not.
    """
    return str(client.get("name") or client.get("base_url") or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/")


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
            Refused: the endpoint refuses this request.
            ConfigError: it would refuse any other as well.
            Interrupted: it cannot be reached, or fails, after all retries.
        """
        import openai

        options = {name: value for name, value in request.sampling.items() if value is not None}
        try:
            status = 0
            for retry in range(self.settings.retries + 1):
                found: Any = self._client.chat.completions.create(
                    model=request.model, messages=request.messages, **options
                )
                error = _error_inside(found)
                if error is None:
                    return self._answer(found)
                status = _status(error)
                if not _transient(status):
                    raise self._refusal(request, status, error, self._hidden(error.get("message", error)))
                if retry < self.settings.retries:
                    time.sleep(min(0.5 * 2**retry, 8.0))
            raise Interrupted(self._outage(f"answers {status}"))
        except openai.APIStatusError as error:
            if _transient(error.status_code):
                raise Interrupted(self._outage(f"answers {error.status_code}")) from None
            body = error.body if isinstance(error.body, dict) else {}
            raise self._refusal(request, error.status_code, body, self._hidden(error)) from None
        except openai.APIConnectionError as error:  # time-outs too
            raise Interrupted(self._outage(f"gives no answer ({self._hidden(error)})")) from None
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            log.debug("%s: no chat completion: %s", self._place, type(error).__name__)
            return None

    def _answer(self, found: Any) -> dict[str, Any]:
        """What is kept of a chat completion, without the key, which some servers repeat."""
        choice = found.choices[0]
        declined = getattr(choice.message, "refusal", None)
        if declined or choice.finish_reason == "content_filter":
            raise EndpointRefused(
                self._hidden(f"the model declines: {declined}" if declined else "its answer was filtered")
            )
        text = _text(choice.message.content)
        return {
            "text": text.replace(self._secret, "***") if len(self._secret) >= SECRET_LENGTH else text,
            "input_tokens": getattr(found.usage, "prompt_tokens", None) or 0,
            "output_tokens": getattr(found.usage, "completion_tokens", None) or 0,
        }

    def _refusal(self, request: Request, status: int, error: Mapping[str, Any], said: str) -> Exception:
        """Refused if it concerns this request or one of its parameters, ConfigError if it concerns all."""
        one = status in OF_ONE_REQUEST or (status == 403 and FILTERED.search(said))
        about = error.get("param")
        if not one or about == "model" or error.get("code") == "model_not_found":
            return ConfigError(f"{self.key}: {self._place} refuses {request.model}: {said}")
        if about in request.sampling and not TOO_LONG.search(
            said
        ):  # some name max_tokens when the question is too long
            return EndpointRefused(said, about)
        return EndpointRefused(said)

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

    def _hidden(self, said: object) -> str:
        text = (
            str(said).replace(self._secret, "***") if self._secret else str(said)
        )  # first: a key cut in two is one too
        return " ".join(text.split())[:300].rstrip(".")


def _transient(status: int) -> bool:
    return status in TRANSIENT or status >= 500


def _error_inside(found: Any) -> dict[str, Any] | None:
    """The error that some gateways send with status 200 in place of a completion."""
    error = getattr(found, "error", None)
    return error if isinstance(error, dict) and not getattr(found, "choices", None) else None


def _status(error: Mapping[str, Any]) -> int:
    """What an error sent with status 200 would have had; 400 if it does not say."""
    code = str(error.get("code") or error.get("status"))
    return int(code) if code.isdecimal() and 400 <= int(code) < 600 else 400


def _text(content: Any) -> str:
    """A message's text, also where it comes in parts."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else vars(part) for part in content]
        return "".join(
            str(part.get("text") or "") for part in parts if part.get("type", "text") in ("text", "output_text")
        )
    return content or ""


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
    secret = os.environ.get(name, "").strip()
    if not secret:
        raise ConfigError(f"{key}.api_key_env={name}: ${name} is not set; allowed: null for a server without keys")
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError(f"{key}.api_key_env={name}: ${name} holds characters that no key has")
    return secret


def check_sampling(sampling: Mapping[str, Any], key: str) -> None:
    """See whether the `openai` package takes these keys; it would say so at the first question only.

    Raises:
        ConfigError: it does not.
    """
    from openai.resources.chat.completions import Completions

    allowed = set(inspect.signature(Completions.create).parameters) - {"self", "model", "messages", "stream", "n"}
    for name in sampling:
        if name not in allowed:
            raise ConfigError(f"{key}.{name} is no key of chat.completions.create; a server's own go below extra_body")


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
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not set("@?#") & set(url)
        )
    except ValueError:
        return False
