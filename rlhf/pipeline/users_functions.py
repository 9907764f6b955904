"""Functions that the configuration names, tried once before anything is trained: they would fail after hours."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hydra
import torch
from torch import Tensor

from rlhf.advantages import RewardedBatch
from rlhf.data.records import DataSource
from rlhf.divergence import configured
from rlhf.errors import ConfigError, first_line
from rlhf.errors.keys import unknown_key
from rlhf.errors.users_code import failure_in_users_code
from rlhf.pipeline.config import check_numbers, instantiate
from rlhf.policy_settings import AdvantagesSettings, DivergenceSettings
from rlhf.scorers import TextContext
from rlhf.scorers.text import FunctionScorer

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
        ConfigError: it fails, or does not return a finite penalty for each token; or one of its other keys is no
            parameter of the function, or has a value that it refuses.
    """
    _check_parameters(settings, named_function("divergence.function", settings.function))
    function, whole = configured(settings), settings.input == "logits"
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
        if isinstance(error, ValueError) and str(error).partition("=")[0] in settings.parameters:
            raise ConfigError(f"divergence.{error}") from error
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


def _check_parameters(settings: DivergenceSettings, function: Callable[..., Any]) -> None:
    """The keys of `divergence` beside the function are parameters of it, and numbers where it asks for numbers."""
    with suppress(ValueError):  # a function of C may have no signature
        allowed = list(inspect.signature(function).parameters)[2:]
        for name in settings.parameters:
            if name not in allowed:
                raise ConfigError(unknown_key(f"divergence.{name}", {*allowed, "function", "input", "name"}))
    check_numbers({"_target_": settings.function, **settings.parameters}, "divergence")


def try_advantages(settings: AdvantagesSettings) -> None:
    """Call the estimator of advantages on three answers to each of two prompts, and look at what it returns.

    Raises:
        ConfigError: it has no such options, fails, or does not return a finite advantage for each token.
    """
    name = f"advantages.function={settings.function}"
    function, baseline = named_function("advantages.function", settings.function), settings.baseline
    parameters = inspect.signature(function).parameters
    known = list(parameters)[1:]
    any_key = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in settings.options:
        if key not in known and not any_key:
            raise ConfigError(unknown_key(f"advantages.options.{key}", known))
    chosen = {"_target_": settings.function, "_partial_": True, **settings.options}
    estimator = instantiate(chosen, "advantages.options")
    mask = torch.arange(3) < torch.tensor([1, 2, 3, 3, 2, 1])[:, None]
    rewards = torch.where(mask, torch.linspace(-1.0, 2.0, steps=18).view(6, 3), 0.0)
    values = rewards / 2 if baseline == "value" else None
    greedy_scores = torch.tensor([0.5, -0.5]).repeat_interleave(3) if baseline == "greedy" else None
    batch = RewardedBatch(rewards, mask, torch.arange(6) // 3, 1.0, 1.0, values, greedy_scores)
    try:
        found = estimator(batch)
    except Exception as error:
        reason = failure_in_users_code(error) or f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{name} failed on a batch of shape (6, 3): {reason}") from error
    if not isinstance(found, Tensor) or found.shape != mask.shape or not found.isfinite().all():
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__}"
        raise ConfigError(
            f"{name} returned {what} for a batch of shape (6, 3); allowed: a finite advantage for each token, of that "
            "shape"
        )


def try_scorer(key: str, path: str, source: DataSource) -> None:
    """Call the function that scores texts on two demonstrations, which exist and are read anyway.

    Raises:
        ConfigError: it fails, or does not return a number for each of them.
    """
    rows = source.load("sft") if "sft" in source.splits else None
    if rows is None or len(rows) < TRIED:
        return
    responses, asked = list(rows["response"][:TRIED]), rows
    try:
        scorer = FunctionScorer(TextContext(source), path)
        if scorer.columns.values:  # which only prompts to be answered have
            asked = source.load("prompts")
        prompts: Sequence[str] = [asked["prompt"][number % len(asked)] for number in range(TRIED)]
        scorer.rate(prompts, responses)
    except ConfigError:
        raise
    except Exception as error:
        reason = failure_in_users_code(error) or f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{key}={path} failed on two demonstrations: {reason}") from error
