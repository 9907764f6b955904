"""Scaling of a PPO step: time against batch size, length and model size; peak memory against the models in memory.

    python benchmarks/scale.py                       about 5 minutes on two cores
    python benchmarks/scale.py --large --write       with the 110M model, and appended to RESULTS.md
    python benchmarks/scale.py --toy

Every point runs in a subprocess with a warm-up step; responses are forced to their full length. Memory is the peak
resident set size minus that after the imports.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import MIB, Spread, isolated, parser_of, peak_rss, report, spread, table
from stage import make_stage, train
from world import SHAPES, make_world

BASE = {"shape": "3.7M", "rollouts": 32, "tokens": 32}
ROLES = {
    "policy, value, reference (score: a function)": ([], False),
    "… and a reward adapter": ([], True),
    "value a model of its own": (["ppo.value_model=full"], True),
    "policy and value models of their own (lora=none)": (["lora=none"], True),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a point")
    parser.add_argument("--large", action="store_true", help="include the 110M model")
    options = parser.parse_args()
    base, sizes, big = BASE, ["3.7M", "16M"], "110M" if options.large else "16M"
    factors = (1, 2, 4)
    if options.large:
        sizes.append("110M")
    if options.toy:
        base, sizes, big, factors = {"shape": "toy", "rollouts": 4, "tokens": 4}, ["toy"], "toy", (1,)
        options.steps, options.threads = 1, 1
    points = [("batch", {**base, "rollouts": base["rollouts"] * factor}) for factor in factors]
    points += [("response", {**base, "tokens": base["tokens"] * factor}) for factor in factors[1:]]
    points += [("model", {**base, "shape": size}) for size in sizes[1:]]
    times = [time_row(varied, point, options) for varied, point in points]
    memory = [memory_row(what, {**base, "shape": big}, options) for what in ROLES]
    text = f"{table(times)}\n\n{table(memory)}"
    report(f"Scaling, {options.threads} threads, LoRA r 8, 1 epoch, minibatches of a quarter", text, options.write)


def time_row(varied: str, point: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Table row with the times of one point."""
    rows, memory = isolated(steps, point, [], True, options.steps, options.threads)
    found: dict[str, Spread] = {key: spread(row[key] for row in rows) for key in rows[0]}
    tokens = point["rollouts"] * (2 * point["tokens"])
    return {
        "varied": varied, "model": point["shape"], "rollouts": point["rollouts"],
        "prompt + response": f"{point['tokens']} + {point['tokens']}", **{f"{key} (s)": x for key, x in found.items()},
        "µs per token": f"{1e6 * found['step'].median / tokens:.0f}", "peak memory (MiB)": f"{memory['step']:.0f}",
    }  # fmt: skip


def memory_row(what: str, point: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Table row with the memory of one set of roles."""
    overrides, reward = ROLES[what]
    _, memory = isolated(steps, point, overrides, reward, 1, options.threads)
    return {
        "roles": what, "models": memory["models"], "weights (MiB)": f"{memory['weights']:.1f}",
        "trainable (MiB)": f"{memory['trainable']:.1f}", "peak once loaded (MiB)": f"{memory['loaded']:.0f}",
        "peak of a step (MiB)": f"{memory['step']:.0f}",
    }  # fmt: skip


def steps(
    point: dict[str, Any], overrides: list[str], reward: bool, count: int, threads: int
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Seconds per phase of each measured step, and memory in MiB; to be run in a subprocess of its own."""
    torch.set_num_threads(threads)
    imported = peak_rss()
    rollouts, tokens = point["rollouts"], point["tokens"]
    with tempfile.TemporaryDirectory() as folder:
        world = isolated(make_world, Path(folder), SHAPES[point["shape"]], (tokens, tokens), method="fork")
        shape = [
            f"ppo.rollout_batch_size={rollouts}", f"ppo.minibatch_size={rollouts // 4}", "ppo.epochs=1",
            f"generation.max_new_tokens={tokens}", f"ppo.steps={count + 1}", "divergence=kl",
        ]  # fmt: skip
        stage = make_stage(world, ["lora=r8", *shape, *overrides], Path(folder), reward=reward)
        loaded = peak_rss()
        lines = train(stage, world.prompts, Path(folder))
    held = list(stage.roles.parameters())
    sizes = [p.numel() * p.element_size() for p in held]
    memory = {
        "models": len(stage.roles.trunks),
        "weights": sum(sizes) / MIB,
        "trainable": sum(size for p, size in zip(held, sizes, strict=True) if p.requires_grad) / MIB,
        "loaded": (loaded - imported) / MIB,
        "step": (peak_rss() - imported) / MIB,
    }
    phases = {"generate": "time/generate", "score": "time/score", "update": "time/update", "step": "seconds"}
    return [{name: line[key] for name, key in phases.items()} for line in lines], memory


if __name__ == "__main__":
    main()
