"""The `rlhf` command in this process, and overrides for runs as small as possible."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hydra._internal.hydra import Hydra

from rlhf.cli import main

TINY = [
    "debug=quick", "data=farm", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "data.demonstrations=200", "data.comparisons=120", "data.prompts=40", "data.eval_prompts=8", "data.people=12",
    "sft.epochs=0.3", "sft.batch_size=10", "sft.warmup_steps=1", "sft.checkpoint_every=2", "sft.log_every=1",
    "sft.validation_size=10", "reward.epochs=0.3", "reward.batch_size=10", "reward.warmup_steps=1",
    "reward.checkpoint_every=2", "reward.validation_size=10", "reward.baseline_rows=10", "generation.max_new_tokens=8",
    "ppo.steps=3", "ppo.eval_every=3", "evaluation.prompts=4", "evaluation.kl_prompts=2",
]  # fmt: skip


def run_in_process(*arguments: str) -> int:
    """Run `rlhf` with these arguments in this process and the current folder; return the exit code."""
    with pytest.MonkeyPatch.context() as patch, own_log():
        patch.setattr(sys, "argv", ["rlhf", *arguments])
        if not any("hydra.mode" in word for word in arguments):
            # Hydra composes everything once more only to read `hydra.mode`, which no file of ours sets
            patch.setattr(Hydra, "get_mode", lambda *args, **keys: None)
        try:
            main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
    return 0


@contextmanager
def two_threads() -> Iterator[None]:
    """Let commands in this process compute with two threads, where the suite has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        try:
            yield
        finally:
            torch.set_num_threads(1)


@contextmanager
def own_log() -> Iterator[None]:
    """Leave the log as found: Hydra's handler opens its file anew for any later record, whether or not it is there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def error_sentence(said: str) -> str:
    """The one-sentence error message in the output of a failed command; asserts that there is no traceback."""
    assert "Traceback" not in said, said
    told = [line for line in said.splitlines() if line.startswith("rlhf: ")]
    assert len(told) == 1, said
    return told[0]
