"""Whether the Hub has what a configuration names, found out with one request before anything else asks for it.

Without a network, every library would try each file of a model again and again, for minutes.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from rlhf.errors import ConfigError, first_line
from rlhf.pipeline import fetching

SECONDS = 5.0  # to wait for an answer
OFFLINE, REASON = "HF_HUB_OFFLINE", "RLHF_HUB_UNREACHABLE"  # environment: also for the processes of a sweep
_found: set[tuple[str, str]] = set()


def check_hub(plain: Mapping[str, Any]) -> None:
    """Check that the models and data sets that are not in the local cache can be fetched.

    A dry run may name what is on the Hub without reaching it, since it may be meant for another machine; a name
    without an owner is then taken to be a folder that does not exist. If the Hub cannot be reached, no library asks
    it again in this process and those that it starts.

    Args:
        plain: the resolved configuration.

    Raises:
        ConfigError: one of them cannot be.
    """
    models, data = fetching.hub_models(plain), fetching.data_sets(plain["data"])
    if not models and not data:
        return
    absent = {f"{key}={name}": (name, "model") for key, name in models.items() if not fetching.held(name)}
    absent |= {f"data: {name}": (name, "dataset") for name in data if not fetching.held(name, "dataset")}
    looked_for = absent or {"": (next(iter([*models.values(), *data])), "model" if models else "dataset")}
    for named, (name, kind) in looked_for.items():
        reason = _unreachable() or _look_for(named, fetching.repository(name), kind)
        if not reason:
            continue
        certain = not plain["dry_run"] or "/" not in name
        if absent and certain:
            raise ConfigError(
                f"{named} is neither here nor in the local cache, and the Hub cannot be reached ({reason}); allowed: "
                "a folder or file, or what the cache holds"
            )
    if absent and _unreachable():
        print(f"rlhf: the Hub cannot be reached ({_unreachable()}), so that it is not known whether it has "
              f"{', '.join(sorted({name for name, _ in absent.values()}))}", file=sys.stderr)  # fmt: skip


def _unreachable() -> str | None:
    """Why the Hub is not to be asked; None if it is."""
    if os.environ.get(REASON):
        return os.environ[REASON]
    return f"{OFFLINE} is set" if constants.HF_HUB_OFFLINE else None


def _look_for(named: str, repository: str, kind: str) -> str | None:
    """Ask the Hub for a repository; returns why there was no answer, and has nobody ask again.

    Raises:
        ConfigError: there is no such repository, or it may not be read.
    """
    if (repository, kind) in _found:
        return None
    api = HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(repository, timeout=SECONDS)
    except GatedRepoError:
        raise ConfigError(f"{named}: its owner must let you in first, at {api.endpoint}/{repository}") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{named} is not here, and the Hub has no such {kind} that you may read; allowed: a folder or file, or "
            "OWNER/NAME as the Hub spells it"
        ) from None
    except HfHubHTTPError as error:  # it answers, if only that something is wrong with it
        return first_line(error)
    except Exception as error:
        os.environ[REASON] = f"{type(error).__name__}: {first_line(error)}"
        os.environ[OFFLINE] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return os.environ[REASON]
    _found.add((repository, kind))
    return None
