"""Run folders with made-up metrics, outcomes and samples, for reports and sweeps."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

VARIANTS = {"lora_kl": (0.36, 0.3), "lora_none": (0.37, 0.9), "full_none": (0.55, 1.4)}

PROMPTS, STEPS = 120, (0, 10, 20, 30, 40, 50)


def write_run(
    folder: Path, variant: str, seed: int, layout: Mapping[str, Any] | None = None, luck: float = 0.0, start: int = 1,
    **changes: Any,
) -> None:  # fmt: skip
    """Write a run folder like those of rlhf.pipeline.run, with made-up curves.

    Args:
        folder: of the run.
        variant: decides how far the win rate gets, and at what distance.
        seed: of PPO.
        layout: `report` of its configuration.
        luck: what the win rate gains besides.
        start: the SFT model.
        changes: override its summary.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng((seed, sum(map(ord, variant))))
    hard = np.random.default_rng(0).normal(0, 0.15, PROMPTS)
    level, kl = VARIANTS.get(variant, (0.4, 0.5))
    lines, outcomes, samples = [], [], []
    for step in STEPS:
        source = np.random.default_rng(start) if step == 0 else rng
        way = step / STEPS[-1]
        win = (source.random(PROMPTS) < 0.25 + (level + luck - 0.25) * way + hard).astype(float)
        stated = source.integers(1, 5, PROMPTS).astype(float)
        true = np.maximum(stated - (source.random(PROMPTS) < 0.1 * way), 0)
        tokens = np.round(source.normal(15 + 6 * way, 2, PROMPTS))
        distance = kl * way * (1 + 0.05 * rng.normal()) if step else 0.0
        gold = 1.4 + 0.5 * math.sqrt(distance) - 0.3 * distance + 0.02 * source.normal(size=PROMPTS)
        reward = 0.1 + 0.6 * math.sqrt(distance) + 0.02 * source.normal(size=PROMPTS)
        metrics = {
            "eval/win_rate": win.mean(), "eval/true_kl": distance, "eval/response_tokens": tokens.mean(),
            "eval/factual_precision": true.sum() / stated.sum(), "eval/facts_per_response": stated.mean(),
            "eval/reward": reward.mean(), "eval/gold_utility": gold.mean(),
        }  # fmt: skip
        lines.append({"step": step, "time": 1.0, "time/evaluate": 2.0, **metrics})
        lines.append({"step": step, "time": 1.5, "ppo/reward": reward.mean(), "ppo/missing_eos": 0.02})
        arrays = {"win": win, "gold_utility": gold, "stated": stated, "true": true, "reward": reward, "tokens": tokens}
        outcomes.append({"step": step, **{key: value.tolist() for key, value in arrays.items()}})
        samples += [
            {"step": step, "prompt": f"Tell me about <{i}>.\n", "response": f"{variant} {step} & more", "win": 1.0,
             "reference_output": "The reference.", "reward": 0.25}
            for i in range(8)
        ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "outcomes.jsonl", outcomes)
    write_lines(folder / "samples.jsonl", samples)
    keys = [key for key in lines[0] if key.startswith("eval/")]
    summary = {
        "metrics": {key: lines[-2][key] for key in keys},
        "sft_metrics": {key: lines[0][key] for key in keys},
        "stage": "ppo",
        "wall_seconds": 60.0,
        "peak_memory_bytes": 2**30,
        "versions": {"torch": "2.13"},
        "git_commit": "abc",
        "config": {"seed": seed, "name": "made_up", "lora": {"r": 8 if "lora" in variant else 0}, "report": layout},
        "overrides": [f"variant={variant}", f"seed={seed}"],
    }
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}))


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_sweep(
    folder: Path, layout: Mapping[str, Any] | None = None, variants: Sequence[str] = tuple(VARIANTS)
) -> Path:
    for variant in variants:
        for seed in (1, 2, 3):
            write_run(folder / f"variant-{variant}_seed-{seed}", variant, seed, layout)
    return folder


def write_pipelines(
    folder: Path, layout: Mapping[str, Any] | None = None, variants: Sequence[str] = ("lora_kl", "lora_none"),
    replicates: Sequence[int] = (1, 2, 3, 4), seeds: Sequence[int] | None = None, spread: float = 0.08,
) -> Path:  # fmt: skip
    """Write a sweep over whole pipelines, each with luck that all its rows share; `seeds` are several PPO runs of each.

    `spread` is the standard deviation of the luck. Without `seeds`, each pipeline has one PPO run.
    """
    luck = {replicate: np.random.default_rng((9, replicate)).normal(0, spread) for replicate in replicates}
    for variant, replicate in product(variants, replicates):
        for seed in seeds or (replicate,):
            axes = [f"variant={variant}", f"replicate={replicate}", *([f"seed={seed}"] if seeds else [])]
            config = {"seed": seed, "sft": {"seed": replicate}, "reward": {"seed": replicate}, "report": layout,
                      "replicate": replicate, "lora": {"r": 8 if "lora" in variant else 0}}  # fmt: skip
            write_run(
                folder / "_".join(axes).replace("=", "-"), variant, 100 * replicate + seed, layout, luck[replicate],
                replicate, config=config, overrides=axes, reward_model=f"reward-{replicate}",
            )  # fmt: skip
    return folder
