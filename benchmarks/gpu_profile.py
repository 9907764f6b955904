"""What the host and the device do in a PPO step: calls, kernels and their time, by torch's profiler."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_runner import Bench
from gpu_steps import toy_or_real
from stage import train
from torch.profiler import ProfilerActivity, profile

from rlhf.rollout.sample import rollout
from rlhf.seeding import generator

ROWS = 30  # of each table


def profiled_step(
    bench: Bench, shape: str, overrides: Sequence[str], prompts: tuple[int, int], rows: int
) -> dict[str, Any]:
    """A line per scoring and update of the second step: the costliest operators for the host and for the device."""
    with tempfile.TemporaryDirectory() as folder:
        stage, texts = toy_or_real(bench, shape, [*overrides, "ppo.steps=2"], prompts, rows, Path(folder))
        stage.timed = in_profiler(stage.timed, bench)  # type: ignore[method-assign]
        train(stage, texts, Path(folder))
    return {}


def profiled_decoding(
    bench: Bench, shape: str, overrides: Sequence[str], prompts: tuple[int, int], rows: int
) -> dict[str, Any]:
    """A line about a rollout of at most 64 tokens, the second of its shape."""
    with tempfile.TemporaryDirectory() as folder:
        stage, texts = toy_or_real(bench, shape, overrides, prompts, rows, Path(folder))
        roles, settings = stage.roles.eval(), stage.config.generation
        limit = min(64, settings.max_new_tokens)
        for turn in range(2):
            stream = generator(0, "profile", turn, roles.device.type)
            with profiler_of(bench) if turn else nullcontext() as profiler:
                rollout(stage.engine, roles, "policy", stage.tokenizer, texts, settings, stream, None, limit)
                if bench.device == "cuda":
                    torch.cuda.synchronize()
        bench.say("profile", phase="generate", **summary(profiler))
    return {}


def profiler_of(bench: Bench) -> profile:
    """A profiler of the host and the device."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device == "cuda" else [])]
    return profile(activities=activities, acc_events=True)


def in_profiler(
    timed: Callable[[str], AbstractContextManager[None]], bench: Bench
) -> Callable[[str], AbstractContextManager[None]]:
    """`Stage.timed` that profiles each phase but generation the second time it is entered."""
    entered: dict[str, int] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        entered[name] = entered.get(name, 0) + 1
        if name not in ("score", "update") or entered[name] != 2:
            with timed(name):
                yield
            return
        with profiler_of(bench) as profiler:
            with timed(name):
                yield
            if bench.device == "cuda":
                torch.cuda.synchronize()
        bench.say("profile", phase=name, **summary(profiler))

    return phase


def summary(profiler: Any) -> dict[str, Any]:
    """Totals in seconds, and the operators with most time of their own on the host and on the device."""
    rows = profiler.key_averages()
    kernels = [row for row in rows if str(row.device_type).endswith("CUDA")]
    host = [row for row in rows if not str(row.device_type).endswith("CUDA")]

    def top(items: list[Any], key: str) -> list[tuple[str, int, float]]:
        found = sorted(items, key=lambda row: -getattr(row, key))[:ROWS]
        return [(row.key[:90], row.count, getattr(row, key) / 1e6) for row in found]

    return {
        "kernels": sum(row.count for row in kernels),
        "device_seconds": sum(row.self_device_time_total for row in kernels) / 1e6,
        "host_calls": sum(row.count for row in host),
        "host_seconds": sum(row.self_cpu_time_total for row in host) / 1e6,
        "host": top(host, "self_cpu_time_total"),
        "device": top(kernels, "self_device_time_total"),
    }  # fmt: skip
