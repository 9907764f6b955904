"""The results of runs on the disk, without times and paths, so that two runs can be compared bit by bit."""

import csv
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

STAGE_FOLDERS = {"SFT": "cache/sft-*", "reward": "cache/reward-*", "PPO": "rlhf/*"}


def collect_results(folder: Path) -> dict[str, Any]:
    """Collect the results of all runs, of the cache and of reports in `folder/outputs`."""
    outputs = folder / "outputs"
    found = collect_run_results(
        path.parent for name in STAGE_FOLDERS.values() for path in outputs.glob(f"{name}/summary.json")
    )
    for path in [*outputs.glob("rlhf/*/alpaca_eval*.json"), *outputs.glob("rlhf/report/**/*.[mct]*")]:
        found[f"{path.parent.name}/{path.name}"] = path.read_text()
    found["registered"] = sorted(path.name for path in outputs.glob("cache/runs/[!.]*"))
    # cache/runs has no locks, so that a kill may leave temporary files there
    found["torn"] = [str(path) for path in outputs.glob("[rc]*/*/.*.*[0-9]") if path.parent.name != "runs"]
    found["report"] = sorted(path.name for path in outputs.glob("rlhf/report/**/*"))
    return found


def collect_run_results(runs: Iterable[Path]) -> dict[str, Any]:
    """Collect models, metrics, samples, summaries and checkpoints of runs, without times and paths."""
    found: dict[str, Any] = {}
    for run in runs:
        name = run.name
        for path in sorted([*run.glob("model/**/*"), *run.glob("model_best/**/*")]):
            if path.suffix in (".safetensors", ".json") and path.name != "adapter_config.json":
                found[f"{name}/{path.parent.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        found[f"{name}/metrics"] = [without_times(json.loads(line)) for line in lines_of(run / "metrics.jsonl")]
        for extra in ("samples.jsonl", "outcomes.jsonl"):
            if (run / extra).exists():
                found[f"{name}/{extra}"] = (run / extra).read_text()
        if (run / "metrics.csv").exists():
            with (run / "metrics.csv").open(encoding="utf-8") as file:
                found[f"{name}/metrics.csv"] = [without_times(row) for row in csv.DictReader(file)]
        summary = json.loads((run / "summary.json").read_text())
        compared = ("stage", "metrics", "sft_metrics", "best", "guards", "rows", "reward_model")
        found[f"{name}/summary"] = without_times({key: summary[key] for key in compared if key in summary})
        kept = sorted(run.glob("checkpoints/step-*.ckpt"))
        best = (summary.get("best") or {}).get("step", 0)
        for path in kept[-1:] + [path for path in kept[:-1] if path.name == f"step-{best:06d}.ckpt"]:
            # Lightning's loop counters include interrupted passes
            found[f"{name}/{path.name}"] = {**torch.load(path, weights_only=True), "loops": None}
    return found


def without_times(node: Any) -> Any:
    """Drop keys of nested dictionaries that depend on the clock."""
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if not key.startswith(("time", "ppo/rollouts_per_second"))}
    return {key: without_times(value) for key, value in kept.items()}


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b), where
    else:
        assert a == b, where
