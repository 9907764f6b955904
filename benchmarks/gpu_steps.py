"""PPO steps on random models at real sizes, phase by phase beside predictions, and decoding beside `generate`."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from decode import laps
from gpu_predict import Work, predicted_gib, predicted_seconds
from gpu_runner import END, Bench, read
from stage import random_stage, train
from world import SHAPES, random_prompts

from rlhf.stages.ppo import PPO

GIB = 2**30
STEPS = 4  # measured steps, if there is time for them
PHASES = ("generate", "score", "update")
TOY = (
    "model.dtype=float32", "ppo.rollout_batch_size=4", "ppo.minibatch_size=2", "ppo.epochs=1",
    "generation.max_new_tokens=4", "generation.batch_size=4",
)  # fmt: skip


def ppo_steps(
    bench: Bench,
    shape: str,
    overrides: Sequence[str],
    prompts: tuple[int, int],
    rows: int,
    card: float | None = None,
) -> dict[str, Any]:
    """A line per phase and per step; the first step is a warm-up.

    Args:
        bench: the measurement.
        shape: a key of `SHAPES`.
        overrides: of the configuration.
        prompts: shortest and longest prompt, in tokens.
        rows: prompts.
        card: limit of PyTorch's memory in GiB, as if the card were that small.
    """
    if card and bench.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(card * GIB / torch.cuda.get_device_properties(0).total_memory)
    with tempfile.TemporaryDirectory() as folder:
        stage, texts = toy_or_real(bench, shape, [*overrides, f"ppo.steps={STEPS + 1}"], prompts, rows, Path(folder))
        stage.timed = spoken(stage.timed, stage, bench)  # type: ignore[method-assign]
        done = 0

        def after(line: Mapping[str, Any]) -> bool:
            nonlocal done
            done += not line["warm_up"]
            found = {phase: line[f"time/{phase}"] for phase in PHASES}
            bench.say(
                "step", warm_up=line["warm_up"], seconds=line["seconds"], **found,
                rollouts=stage.ppo.rollout_batch_size, first_ratio=line["ppo/first_ratio"],
                tokens=line["ppo/response_tokens"],
            )  # fmt: skip
            return bench.left > (0.3 if line["warm_up"] else 0.9) * line["seconds"]

        train(stage, texts, Path(folder), after)
    return {"measured_steps": done}


def toy_or_real(
    bench: Bench, shape: str, overrides: Sequence[str], prompts: tuple[int, int], rows: int, folder: Path
) -> tuple[PPO, list[str]]:
    """A stage and its prompts, and a line about what loading took and what is predicted."""
    if bench.toy:
        shape, overrides, prompts, rows = "toy_neox" if "neox" in shape else "toy", [*overrides, *TOY], (4, 8), 4
    started = time.monotonic()
    stage = random_stage(SHAPES[shape], overrides, folder, bench.device)
    loading = time.monotonic() - started
    texts = random_prompts(rows, prompts, SHAPES[shape]["vocab_size"])
    bench.say("loaded", seconds=loading, **memory(bench), predicted=predictions(bench, stage, texts))
    return stage, texts


def predictions(bench: Bench, stage: PPO, texts: Sequence[str]) -> dict[str, Any]:
    """Seconds and GiB of each phase, by the rates that this results file has last."""
    rates = [line for line in read(bench.results) if line["kind"] == END and "flops" in line]
    base = stage.roles.trunk("reference")
    held = sum(p.numel() * p.element_size() for name, p in base.named_parameters() if ".lora_" not in name)
    embeddings = base.get_input_embeddings().weight
    held -= embeddings.numel() * embeddings.element_size()  # of which a step reads a row per token
    work = Work.of(base, stage.config, [len(text.split()) for text in texts[: stage.ppo.rollout_batch_size]], held)
    seconds = predicted_seconds(work, stage.config, rates[-1]) if rates else {}
    return {"seconds": seconds, "gib": predicted_gib(stage.config, base.config.vocab_size, bench.device == "cuda")}


def memory(bench: Bench) -> dict[str, float]:
    """Peak GPU memory since the last call, in GiB: of tensors, and as reserved."""
    if bench.device != "cuda":
        return {}
    found = {"peak": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB}
    torch.cuda.reset_peak_memory_stats()
    return found


def spoken(
    timed: Callable[[str], AbstractContextManager[None]], stage: PPO, bench: Bench
) -> Callable[[str], AbstractContextManager[None]]:
    """`Stage.timed`, with a line at the end of each phase."""

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        memory(bench)
        before = stage.timings.get(f"time/{name}", 0.0)
        with timed(name):
            yield
        bench.say("phase", phase=name, seconds=stage.timings[f"time/{name}"] - before, **memory(bench))

    return phase


def decoding(
    bench: Bench, shape: str, overrides: Sequence[str], prompts: tuple[int, int], rows: int, limit: int
) -> dict[str, Any]:
    """A line per engine and repeat: native and `generate`, on one batch whose responses never end early."""
    with tempfile.TemporaryDirectory() as folder:
        stage, texts = toy_or_real(bench, shape, overrides, prompts, rows, Path(folder))
        for repeat, engine, seconds, tokens in laps(stage, texts, 4 if bench.toy else limit, 1 if bench.toy else 5):
            bench.say("decoded", engine=engine, warm_up=repeat == 0, seconds=seconds, rate=tokens / seconds)
    return {}
