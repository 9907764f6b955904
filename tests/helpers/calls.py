"""Patched functions: calls are recorded, or preceded by another call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def record_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[tuple, Any]]:
    """Record (positional arguments, result) of each call of `owner.name`, which still does what it did."""
    real, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


@contextmanager
def before_call(owner: Any, name: str, act: Callable[..., None]) -> Iterator[None]:
    """Call `act` with the positional arguments before each call of `owner.name`."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
