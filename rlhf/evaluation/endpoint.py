"""An OpenAI-compatible endpoint, with retries, whose failures are explained in one sentence each."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ConfigError, EndpointRefused, Interrupted
from rlhf.evaluation.client_settings import ClientSettings, Price, check_client

log = logging.getLogger(__name__)
TRANSIENT_STATUSES = (408, 409, 425, 429)  # these and all from 500 on may succeed later
ONE_REQUEST_STATUSES = (400, 413, 414, 422, 451)  # concern a single request; all other statuses fail every request
FILTERED = re.compile(r"(?i)moderation|flagged|content.?(filter|policy|management)")
TOO_LONG = re.compile(r"(?i)context|too long|maximum.{0,30}(length|tokens)|exceed")
MIN_SECRET_LENGTH = 8  # shorter keys are dummies ("EMPTY", "x"), and those letters may occur in a normal answer
MAX_BACKOFF_SECONDS = 8.0
PING_SECONDS = 10.0
MAX_ERROR_LENGTH = 300  # characters of a server's error message that are shown


@dataclass(frozen=True)
class Request:
    """One question to a chat model.

    Attributes:
        model: The model's name at the endpoint.
        messages: The chat, as `{"role": …, "content": …}`.
        parse: Turns the answer's text into a value, or None if it cannot.
        sampling: Further arguments of `chat.completions.create`; None values are omitted.
        price: The price by which the answer is accounted.
    """

    model: str
    messages: list[dict[str, str]]
    parse: Callable[[str], Any]
    sampling: dict[str, Any] = field(default_factory=dict)
    price: Price = field(default_factory=Price)


class Endpoint:
    """The `openai` client, with errors in the words of this project.

    Args:
        settings: Address, key, time-out and retries.
        key: The configuration key of the settings, for error messages.

    Raises:
        ConfigError: A package or the API key is missing, or the address is malformed.
    """

    def __init__(self, settings: ClientSettings, key: str):
        self.settings, self.key = settings, key
        self._secret = check_client(settings, key)
        for name in ("httpx", "httpx2", "openai"):  # they log a line per request
            logging.getLogger(name).setLevel(logging.WARNING)
        import openai

        self._client = openai.OpenAI(
            api_key=self._secret or "none",
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=settings.retries,
        )
        self._address = str(self._client.base_url).rstrip("/")

    def fetch(self, request: Request) -> dict[str, Any] | None:
        """Request one chat completion.

        Returns:
            The answer as `text`, `input_tokens` and `output_tokens`, or None if the response is not a chat completion.

        Raises:
            EndpointRefused: The endpoint refuses this request, but may answer others.
            ConfigError: The endpoint would refuse any other request as well.
            Interrupted: The endpoint cannot be reached or fails, after all retries.
        """
        import openai

        options = {name: value for name, value in request.sampling.items() if value is not None}
        try:
            status = 0
            # The package retries errors with an error status by itself. This loop is for errors sent with status 200.
            for retry in range(self.settings.retries + 1):
                completion: Any = self._client.chat.completions.create(
                    model=request.model, messages=request.messages, **options
                )
                error = _embedded_error(completion)
                if error is None:
                    return self._read_completion(completion)
                status = _embedded_status(error)
                if not _is_transient(status):
                    raise self._refusal(request, status, error, self._redacted(error.get("message", error)))
                if retry < self.settings.retries:
                    time.sleep(min(0.5 * 2**retry, MAX_BACKOFF_SECONDS))
            raise Interrupted(self._outage_message(f"answers {status}"))
        except openai.APIStatusError as error:
            if _is_transient(error.status_code):
                raise Interrupted(self._outage_message(f"answers {error.status_code}")) from None
            body = error.body if isinstance(error.body, dict) else {}
            raise self._refusal(request, error.status_code, body, self._redacted(error)) from None
        except openai.APIConnectionError as error:  # includes time-outs
            raise Interrupted(self._outage_message(f"gives no answer ({self._redacted(error)})")) from None
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            log.debug("%s: not a chat completion: %s", self._address, type(error).__name__)
            return None

    def _read_completion(self, completion: Any) -> dict[str, Any]:
        """Return the parts of a chat completion that are stored, with the API key masked.

        Raises:
            EndpointRefused: The model declined to answer, or its answer was filtered.
        """
        choice = completion.choices[0]
        declined = getattr(choice.message, "refusal", None)
        if declined or choice.finish_reason == "content_filter":
            raise EndpointRefused(
                self._redacted(f"the model declines: {declined}" if declined else "its answer was filtered")
            )
        text = _message_text(choice.message.content)
        return {
            # Some servers repeat the key in their answers.
            "text": text.replace(self._secret, "***") if len(self._secret) >= MIN_SECRET_LENGTH else text,
            "input_tokens": getattr(completion.usage, "prompt_tokens", None) or 0,
            "output_tokens": getattr(completion.usage, "completion_tokens", None) or 0,
        }

    def _refusal(self, request: Request, status: int, error: Mapping[str, Any], message: str) -> Exception:
        """Return the exception for a refused request.

        It is EndpointRefused if the refusal concerns this request or one of its parameters, and ConfigError if it
        concerns all requests.
        """
        one_request = status in ONE_REQUEST_STATUSES or (status == 403 and FILTERED.search(message))
        parameter = error.get("param")
        if not one_request or parameter == "model" or error.get("code") == "model_not_found":
            return ConfigError(f"{self.key}: {self._address} refuses {request.model}: {message}")
        # Some servers name max_tokens when in fact the question is too long.
        if parameter in request.sampling and not TOO_LONG.search(message):
            return EndpointRefused(message, parameter)
        return EndpointRefused(message)

    def ping(self) -> None:
        """Check that the endpoint can be reached and accepts the key, by asking once for its list of models.

        Raises:
            ConfigError: It cannot be reached, or refuses the key.
        """
        import openai

        quick = self._client.with_options(max_retries=0, timeout=min(PING_SECONDS, self.settings.timeout))
        try:
            quick.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            name = self.settings.api_key_env
            raise ConfigError(f"{self.key}.api_key_env={name}: {self._address} refuses the key in ${name}") from None
        except openai.APIConnectionError as error:
            raise ConfigError(
                f"{self.key}.base_url: nobody answers at {self._address} ({self._redacted(error)});"
                f" {self.key}.ping=false skips this check"
            ) from None
        except (openai.APIError, ValueError):
            pass  # the server is up; not every server can list its models

    def _outage_message(self, what: str) -> str:
        kept = "what was judged is kept, and the same command continues"
        return f"{self._address} {what} after {self.settings.retries} retries; {kept}"

    def _redacted(self, message: object) -> str:
        """Return a server's message on one line, shortened, with the API key masked."""
        text = str(message)
        if self._secret:
            text = text.replace(self._secret, "***")  # before shortening, which could leave half of the key
        return " ".join(text.split())[:MAX_ERROR_LENGTH].rstrip(".")


def _is_transient(status: int) -> bool:
    return status in TRANSIENT_STATUSES or status >= 500


def _embedded_error(completion: Any) -> dict[str, Any] | None:
    """Return the error that some gateways send with status 200 in place of a completion."""
    error = getattr(completion, "error", None)
    return error if isinstance(error, dict) and not getattr(completion, "choices", None) else None


def _embedded_status(error: Mapping[str, Any]) -> int:
    """Return the HTTP status that an error sent with status 200 names, 400 if it names none."""
    code = str(error.get("code") or error.get("status"))
    return int(code) if code.isdecimal() and 400 <= int(code) < 600 else 400


def _message_text(content: Any) -> str:
    """Return the text of a message, whose content may be a string, a list of parts or None."""
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else vars(part) for part in content]
        return "".join(
            str(part.get("text") or "") for part in parts if part.get("type", "text") in ("text", "output_text")
        )
    return content or ""
