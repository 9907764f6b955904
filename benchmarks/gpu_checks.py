"""Every path that a GPU takes, once, at toy size: against the CPU in float32, for sense in low precision."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_runner import Bench, Item
from stage import make_stage, train
from world import SHAPES, World, make_world

from rlhf.models.sequences import Sequences
from rlhf.seeding import generator
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import read_metrics

COMMON = (
    "divergence=kl", "ppo.rollout_batch_size=16", "ppo.minibatch_size=8", "ppo.epochs=2", "ppo.microbatch_tokens=128",
    "generation.max_new_tokens=24", "generation.batch_size=16", "ppo.steps=2", "generation.cuda_graphs=never",
)  # fmt: skip
COMPARED = (
    "ppo/reward", "ppo/response_tokens", "ppo/policy_loss", "ppo/value_loss", "ppo/grad_norm", "ppo/entropy", "ppo/k1",
    "ppo/explained_variance",
)  # fmt: skip
TOLERANCE = 1e-4  # of those metrics between devices in float32, where 1e-6 was measured
GRAPHS, CHECKPOINTS = "generation.cuda_graphs=auto", "model.gradient_checkpointing=true"
INT8, NF4, DROPOUT = "quantization=int8", "quantization=nf4", "lora=paper"
EXACT = {
    "plain": (), "graphs": (GRAPHS,), "neox": ("neox",), "neox graphs": ("neox", GRAPHS),
    "trunk_head": ("ppo.value_model=trunk_head",), "exact divergence": ("divergence=jensen_shannon",),
    "lora=none": ("lora=none",), "checkpointing": (CHECKPOINTS,),
    "target_kl standardize": ("ppo.target_kl=10", "ppo.score_normalization=standardize"),
}  # fmt: skip
ROUNDED = {
    "bfloat16": (), "bfloat16 graphs": (GRAPHS,), "bfloat16 dropout checkpointing": (DROPOUT, CHECKPOINTS),
    "nf4": (NF4,), "nf4 graphs": (NF4, GRAPHS), "int8": (INT8,), "int8 checkpointing": (INT8, CHECKPOINTS),
    "int8 graphs dropout": (INT8, GRAPHS, DROPOUT),
}  # fmt: skip


def toy_world(folder: Path, shape: str, dtype: str) -> World:
    """A toy world, some of whose responses end early."""
    return make_world(folder / f"{shape}-{dtype}", SHAPES[shape], (4, 12), -1.0, 16, dtype=getattr(torch, dtype))


def toy_stage(folder: Path, device: str, dtype: str, options: Sequence[str]) -> tuple[PPO, World]:
    """A stage on a toy world that draws the same random numbers on every device and multiplies without TF32."""
    shape = "toy_neox" if "neox" in options else "toy"
    world = toy_world(folder, shape, dtype)
    chosen = [] if any(option.startswith("lora=") for option in options) else ["lora=r8"]
    targets = ["lora.target_modules=[query_key_value,dense]"] if shape == "toy_neox" else []
    overrides = [*chosen, *targets, f"model.dtype={dtype}", *COMMON, *(x for x in options if x != "neox")]
    stage = make_stage(world, overrides, folder, device)
    torch.set_float32_matmul_precision("highest")
    stage.stream = lambda purpose, step: generator(stage.config.seed, purpose, step)  # type: ignore[method-assign]
    return stage, world


def steps(device: str, dtype: str, options: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of two PPO steps."""
    with tempfile.TemporaryDirectory() as folder:
        stage, world = toy_stage(Path(folder), device, dtype, options)
        train(stage, world.prompts, Path(folder))
        return read_metrics(Path(folder))


def largest_gap(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> tuple[str, float]:
    """The compared metric that differs most, and by how much."""
    gaps = {
        key: max(abs(x[key] - y[key]) for x, y in zip(ours, theirs, strict=True)) for key in COMPARED if key in ours[0]
    }
    worst = max(gaps, key=lambda key: gaps[key])
    return worst, gaps[worst]


def as_on_the_cpu(bench: Bench, options: Sequence[str]) -> dict[str, Any]:
    """Two float32 steps on the device and on the CPU: the same metrics."""
    with warnings_of_rlhf() as warned:
        ours = steps(bench.device, "float32", options)
        theirs = steps("cpu", "float32", [option for option in options if option != GRAPHS])
    worst, gap = largest_gap(ours, theirs)
    return {"ok": gap < TOLERANCE, "worst": worst, "gap": gap, "step": phases(ours[-1]), "warned": warned}


def sensible(bench: Bench, options: Sequence[str]) -> dict[str, Any]:
    """Two steps in low precision: the first ratio is 1, and gradients are finite."""
    with warnings_of_rlhf() as warned:
        lines = steps(bench.device, "bfloat16", options)
    ratios, norms = [line["ppo/first_ratio"] for line in lines], [line["ppo/grad_norm"] for line in lines]
    tolerance = 1e-3 if INT8 in options else 1e-6  # int8 misses it by 3e-5 on a CPU
    ok = all(abs(ratio - 1) < tolerance for ratio in ratios) and all(norm < 1e4 for norm in norms)
    return {"ok": ok, "ratios": ratios, "norms": norms, "step": phases(lines[-1]), "warned": warned}


def after_training(bench: Bench, options: Sequence[str]) -> dict[str, Any]:
    """A reward model's scores before and after a trainer, which must leave it where it was."""
    batch = Sequences.from_lists([[3, 4, 5]] * 4, [[6, 7, 8]] * 4)
    with tempfile.TemporaryDirectory() as folder:
        stage, world = toy_stage(Path(folder), bench.device, "bfloat16", options)
        found = []
        for turn in range(2):
            with torch.no_grad():
                roles = stage.roles.eval()
                found.append(roles.last_token_scores("reward", batch).cpu())
            if turn == 0:
                train(stage, world.prompts, Path(folder))
    gap = float((found[0] - found[1]).abs().max())
    return {"ok": roles.device.type == bench.device and gap < 2e-2, "device": str(roles.device), "gap": gap}


def same_bits(bench: Bench) -> dict[str, Any]:
    """The same run twice."""
    worst, gap = largest_gap(steps(bench.device, "bfloat16", ()), steps(bench.device, "bfloat16", ()))
    return {"ok": True, "same": gap == 0, "worst": worst, "gap": gap}


def phases(line: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each phase."""
    return {key.removeprefix("time/"): round(value, 3) for key, value in line.items() if key.startswith("time/")}


@contextmanager
def warnings_of_rlhf() -> Any:
    """The first warnings that `rlhf` logs inside this block, shortened."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage()[:160]) if len(found) < 2 else None  # type: ignore
    logging.getLogger("rlhf").addHandler(handler)
    try:
        yield found
    finally:
        logging.getLogger("rlhf").removeHandler(handler)


def items(check: Callable[..., dict[str, Any]], title: str, table: Mapping[str, Sequence[str]]) -> dict[str, Item]:
    """An item per row of a table of options."""
    return {f"{title} {name}": partial(check, options=options) for name, options in table.items()}


PLACES = {"bfloat16": (), "nf4": (NF4,), "int8": (INT8,)}
CHECKS: dict[str, Item] = {
    **items(as_on_the_cpu, "float32", EXACT),
    "same bits": same_bits,
    **items(sensible, "sensible", ROUNDED),
    **items(after_training, "after training", PLACES),
}
