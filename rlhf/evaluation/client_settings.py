"""The settings of an OpenAI-compatible endpoint, and checks that catch mistakes in them before a model is loaded."""

import importlib.util
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from rlhf.errors import ConfigError, missing_package
from rlhf.schema import at_least_zero, positive


@dataclass
class ClientSettings:
    """How answers are fetched from an endpoint.

    Only the endpoint itself affects the answers (see `endpoint_identity`); all other settings do not.

    Attributes:
        base_url: The server's address. None leaves the choice to the `openai` package (OpenAI, or $OPENAI_BASE_URL).
        api_key_env: The environment variable that holds the key. None for a server without keys.
        timeout: Seconds per request.
        retries: Attempts after the first one, after 0.5, 1, 2, 4, 8, 8, … seconds or as Retry-After says.
        concurrency: The number of requests that are in flight at the same time.
        ping: Whether to check that the endpoint answers before anything is built.
        cache: The folder of cached answers. None for `<output_dir>/cache/judge`.
        name: A name that identifies the endpoint in place of its address, for servers that move from node to node.
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


def endpoint_identity(client: Mapping[str, Any]) -> str:
    """Return what identifies an endpoint: the `name` or else the address from its client's keys; "" for OpenAI.

    This and all keys outside of `client` determine the answers. The other keys of `client` (time-outs, retries,
    concurrency, ping, the cache's folder and the name of the key's variable) do not.
    """
    return str(client.get("name") or client.get("base_url") or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/")


def check_client(settings: ClientSettings, key: str) -> str:
    """Check packages, address and API key.

    Args:
        settings: The settings to check.
        key: The configuration key of the settings, for error messages.

    Returns:
        The API key, "" for a server without keys.

    Raises:
        ConfigError: Something is missing or malformed. The message never contains the API key.
    """
    for package in ("openai", "diskcache"):
        check_package(package, key)
    if settings.base_url is not None and not _is_address(settings.base_url):
        # The value is not repeated: it may contain a key.
        raise ConfigError(
            f"{key}.base_url is not an address; allowed: one such as http://localhost:8000/v1, without a key in it"
        )
    name = settings.api_key_env
    if name is None:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        # The value is not repeated: it may be the key itself, written here by mistake.
        raise ConfigError(f"{key}.api_key_env is not a name; allowed: that of an environment variable, or null")
    secret = os.environ.get(name, "").strip()
    if not secret:
        raise ConfigError(f"{key}.api_key_env={name}: ${name} is not set; allowed: null for a server without keys")
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError(f"{key}.api_key_env={name}: ${name} contains characters that no API key has")
    return secret


def check_sampling(sampling: Mapping[str, Any], key: str) -> None:
    """Check that `chat.completions.create` accepts these keys, which would otherwise fail only at the first request.

    Raises:
        ConfigError: It does not accept one of them.
    """
    from openai.resources.chat.completions import Completions

    allowed = set(inspect.signature(Completions.create).parameters) - {"self", "model", "messages", "stream", "n"}
    for name in sampling:
        if name not in allowed:
            raise ConfigError(
                f"{key}.{name} is not a key of chat.completions.create; a server's own keys go below extra_body"
            )


@cache
def check_package(package: str, key: str) -> None:
    """Check that an optional package is installed.

    Raises:
        ConfigError: It is not. The message gives the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(missing_package(key, package, "judge"))


def _is_address(url: str) -> bool:
    """Whether `url` is an http(s) address without credentials, query or fragment."""
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not set("@?#") & set(url)
        )
    except ValueError:
        return False
