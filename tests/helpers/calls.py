"""Calls of a function, recorded or preceded by another call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def record_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[tuple, Any]]:
    """(arguments, result) of each call; the call itself is the real one."""
    real, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(owner, name, call)
    return calls


@contextmanager
def before_call(owner: Any, name: str, act: Callable[..., None]) -> Iterator[None]:
    """`act` is called with the arguments before the real thing is."""
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
