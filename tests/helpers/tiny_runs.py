"""Whole runs in this process, as small as they get, and what they leave."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main

TINY = [
    "debug=quick", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "data.demonstrations=200", "data.comparisons=120", "data.prompts=40", "data.eval_prompts=8", "data.people=12",
    "sft.epochs=0.3", "sft.batch_size=10", "sft.warmup_steps=1", "sft.checkpoint_every=2", "sft.log_every=1",
    "sft.validation_size=10", "reward.epochs=0.3", "reward.batch_size=10", "reward.warmup_steps=1",
    "reward.checkpoint_every=2", "reward.validation_size=10", "reward.baseline_rows=10", "generation.max_new_tokens=8",
    "ppo.steps=3", "ppo.eval_every=3", "evaluation.prompts=4", "evaluation.kl_prompts=2",
]  # fmt: skip


def rlhf(*arguments: str) -> int:
    """Run the command in this process and folder; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf", *arguments])
        try:
            main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """Run `rlhf` in this process: (exit code, all that it says). An error of ours is raised, as it would be shown."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        code = rlhf(*arguments)
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def sentence(said: str) -> str:
    """The one sentence that a failed command ends in."""
    assert "Traceback" not in said, said
    told = [line for line in said.splitlines() if line.startswith("rlhf: ")]
    assert len(told) == 1, said
    return told[0]


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
