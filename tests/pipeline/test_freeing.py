"""What a finished stage held is freed before the next stage is built."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from rlhf.models.roles import Roles
from rlhf.pipeline.run import Run
from tests.helpers.calls import before_call
from tests.helpers.command_line import TINY


def test_the_models_of_a_stage_are_freed_before_the_next(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for Python's collection of cycles, which counts objects and not the bytes behind them."""
    made: list[weakref.ref] = []
    alive: list[int] = []

    def count(*_: Any) -> None:
        alive.append(sum(model() is not None for model in made))

    def note(roles: Roles, *_: Any) -> None:
        made.append(weakref.ref(roles))

    gc.collect()
    gc.disable()
    try:
        with (
            before_call(Roles, "__init__", note),
            before_call(Run, "_builder", count),
            before_call(Run, "_train_or_evaluate", count),
        ):
            code, _, error = command(*TINY, "trainer=cpu")
    finally:
        gc.enable()
    assert code == 0, error
    assert len(made) >= 3
    assert alive == [0, 0, 0]
