"""Functions that the configuration names, tried once before anything is trained: they would fail after hours."""

from collections.abc import Callable, Sequence
from typing import Any

import hydra
import torch
from torch import Tensor

from rlhf.data.records import DataSource
from rlhf.errors import ConfigError, first_line
from rlhf.errors.users_code import failure_in_users_code
from rlhf.scorers.text import FunctionScorer
from rlhf.settings import DivergenceSettings

TRIED = 2  # demonstrations that a scorer's function is tried on


def named_function(key: str, path: str) -> Callable[..., Any]:
    """The function that a key names as package.module.name.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return hydra.utils.get_method(path)
    except (ValueError, ImportError, AttributeError) as error:
        cause = error.__cause__ or error.__context__ or error
        reason = failure_in_users_code(cause) or f"{type(cause).__name__}: {first_line(cause)}"
        hint = " (its folder must be on PYTHONPATH)" if isinstance(cause, ModuleNotFoundError) else ""
        raise ConfigError(
            f"{key}={path} cannot be imported: {reason}{hint}; allowed: a function as package.module.name"
        ) from error


def try_divergence(settings: DivergenceSettings) -> None:
    """Call the divergence on a few numbers, and look at what it returns.

    Raises:
        ConfigError: it fails, or does not return a finite penalty for each token.
    """
    function, whole = named_function("divergence.function", settings.function), settings.input == "logits"
    shape, expected = ((1, 3, 5), (1, 3)) if whole else ((2, 3), (2, 3))
    if settings.input == "none":
        return
    policy, reference = (torch.linspace(*ends, steps=shape[-1]).expand(shape) for ends in ((-2.0, -0.1), (-1.0, -0.5)))
    if whole:
        policy, reference = policy.clone().requires_grad_(), reference.clone()
    name = f"divergence.function={settings.function}"
    try:
        found = function(policy, reference)
    except Exception as error:
        reason = failure_in_users_code(error) or f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{name} failed on two tensors of shape {shape}: {reason}") from error
    what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
    if not isinstance(found, Tensor) or found.shape != expected:
        raise ConfigError(
            f"{name} returned {what} for two tensors of shape {shape}; allowed: a penalty for each token, shape "
            f"{expected}"
        )
    if not found.isfinite().all():
        raise ConfigError(f"{name} returned {found.flatten().tolist()}; allowed: finite numbers")
    if whole and not found.requires_grad:
        raise ConfigError(f"{name} has no gradient, and with divergence.input=logits it is a term of the loss")


def try_scorer(key: str, path: str, source: DataSource) -> None:
    """Call the function that scores texts on two demonstrations, which exist and are read anyway.

    Raises:
        ConfigError: it fails, or does not return a number for each of them.
    """
    rows = source.load("sft").select(range(TRIED)) if "sft" in source.splits else None
    if rows is None or len(rows) < TRIED:
        return
    prompts: Sequence[str] = list(rows["prompt"])
    try:
        FunctionScorer(None, path).rate(prompts, list(rows["response"]))  # type: ignore[arg-type]
    except ConfigError:
        raise
    except Exception as error:
        reason = failure_in_users_code(error) or f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{key}={path} failed on two demonstrations: {reason}") from error
