"""What runs share, each built once into a folder of the cache: SFT model, comparisons of its answers, reward model.

A module per product. The identity of a product covers the code of its module and of everything of ours that it imports,
except `rlhf.pipeline.identity.WATCHING`. So a module should import nothing that does not decide what it builds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning

from rlhf.data.records import DataSource
from rlhf.models.roles import Roles
from rlhf.settings import Settings, SupervisedSettings

MakeTrainer = Callable[..., lightning.Trainer]


@dataclass(frozen=True)
class Site:
    """What every builder works with.

    `plain` is the configuration as plain values, for the summary. `quantization` says how the frozen base is stored
    (None: unquantized). `place` tries models out and moves them to where they will train.
    """

    settings: Settings
    plain: dict[str, Any]
    source: DataSource
    quantization: dict[str, Any] | None
    make_trainer: MakeTrainer
    place: Callable[[Roles, bool], None]


def steps_of(settings: SupervisedSettings, rows: int) -> int:
    """Optimiser steps of a supervised stage: its epochs over the rows, at most `max_steps`."""
    steps = math.ceil(settings.epochs * rows / settings.batch_size)
    return min(steps, settings.max_steps or steps)
