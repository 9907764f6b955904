"""Settings with a single guard, and scorers that return bad scores."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlhf.settings import GuardSettings, GuardsSettings, LimitGuard, Settings
from tests.helpers.ppo_stages import count_low_words, ppo_settings

Line = dict[str, float]


def single_guard(name: str, action: str, over: int, limit: float | None = None) -> GuardsSettings:
    """Settings in which all guards but one are off."""
    option = GuardSettings(action, over) if limit is None else LimitGuard(action, over, limit)
    return GuardsSettings(**{name: option})


def settings_with_guards(guards: GuardsSettings, **options: Any) -> Settings:
    return replace(ppo_settings(**options), guards=guards)


def scores_bad_at_calls(
    *calls: int, value: float = math.nan, rows: slice = slice(1)
) -> Callable[[list[str], list[str]], list[float]]:
    """A scorer that returns `value` for the rollouts `rows` at the given calls, which are counted from 1."""
    made = 0

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        nonlocal made
        made += 1
        scores = torch.tensor(count_low_words(prompts, responses))
        if made in calls:
            scores[rows] = value
        return scores.tolist()

    return score
