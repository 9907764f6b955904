"""PPO on one GPU at real sizes: LLaMA-7B's and GPT-NeoX-20B's shapes with random weights, SmolLM2 on Alpaca, decoding.

    python benchmarks/gpu.py --results gpu.jsonl                 every part that is not in gpu.jsonl yet
    python benchmarks/gpu.py --results gpu.jsonl llama_7b_bf16   this part
    python benchmarks/gpu.py --results gpu.jsonl smollm2 --smollm2 model.name_or_path=FOLDER data.root=FOLDER
    python benchmarks/gpu.py --toy                               all of it on a CPU, in seconds

Each part runs in a subprocess for less than 9 minutes (--minutes) and appends a line to the results. If the command is
interrupted, the same command runs the parts that are missing. No part is started that might not end within --total
minutes. Weights are drawn once per shape in --scratch (41 GB for 20B, one shape at a time) and loaded as in `rlhf`.
Without --smollm2, SmolLM2 has random weights (and an untied output matrix: 163M parameters). The 20B parts are limited
to 23 GiB by PyTorch, which is what a 24 GB card has left besides its CUDA context.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import commit, isolated, machine, report, spread, table
from decode import ending_halfway, rates
from world import NEVER, SHAPES, World, composed, make_stage, make_world, save_world, train

from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.pipeline.config import instantiate

GIB = 2**30
# conf/ppo/paper.yaml and conf/generation/paper.yaml, with a budget of tokens that fits beside 7B parameters
PAPER = (
    "ppo=paper", "generation=paper", "lora=paper", "divergence=kl", "model.dtype=bfloat16",
    "ppo.microbatch_tokens=2048",
)  # fmt: skip
CARD = (
    "lora=r8", "lora.target_modules=[query_key_value,dense]", "divergence=kl", "model.dtype=bfloat16", "ppo.epochs=2",
    "model.gradient_checkpointing=true", "ppo.rollout_batch_size=8", "ppo.minibatch_size=8", "generation.batch_size=8",
    "ppo.microbatch_tokens=256", "generation.max_new_tokens=32",
)  # fmt: skip
SMALL = (
    "lora=r8", "divergence=kl", "model.dtype=bfloat16", "ppo.rollout_batch_size=256", "ppo.minibatch_size=128",
    "ppo.epochs=2", "ppo.microbatch_tokens=16384", "generation.max_new_tokens=128", "generation.batch_size=256",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A measurement of PPO steps, or of the decoding engines.

    Attributes:
        shape: key of `SHAPES`.
        overrides: of the configuration.
        prompts: shortest and longest prompt, in tokens.
        rows: number of prompts.
        card: memory limit in GiB, if any.
        decode: measure the decoding engines instead of PPO steps.
        real: use the real model and data of --smollm2, if given.
    """

    shape: str
    overrides: tuple[str, ...]
    prompts: tuple[int, int]
    rows: int = 256
    card: float | None = None
    decode: bool = False
    real: bool = False


PARTS = {
    "smollm2": Part("smollm2_135m", SMALL, (16, 128), real=True),
    "decode_smollm2": Part("smollm2_135m", SMALL, (16, 128), decode=True),
    "llama_7b_bf16": Part("llama_7b", PAPER, (32, 192)),
    "llama_7b_int8": Part("llama_7b", (*PAPER, "quantization=int8"), (32, 192)),
    "llama_7b_nf4": Part("llama_7b", (*PAPER, "quantization=nf4"), (32, 192)),
    "decode_7b": Part("llama_7b", (*PAPER, "generation.max_new_tokens=128"), (32, 192), 64, decode=True),
    "neox_20b_int8": Part("gpt_neox_20b", (*CARD, "quantization=int8"), (16, 32), 32, 23.0),
    "neox_20b_nf4": Part("gpt_neox_20b", (*CARD, "quantization=nf4"), (16, 32), 32, 23.0),
}
TOY = (
    "model.dtype=float32", "ppo.rollout_batch_size=4", "ppo.minibatch_size=2", "ppo.epochs=1",
    "generation.max_new_tokens=4", "generation.batch_size=4",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all that are missing")
    parser.add_argument(
        "--results", type=Path, default=Path("gpu.jsonl"), help="a file with a JSON line per finished part"
    )
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "rlhf-bench-worlds")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, if time allows")
    parser.add_argument("--minutes", type=float, default=8.5, help="limit of a part")
    parser.add_argument(
        "--total", type=float, default=24 * 60, help="start no part that might end after this many minutes"
    )
    parser.add_argument(
        "--smollm2", nargs="*", default=(), help="overrides that name model and data of the part smollm2"
    )
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="overrides, after those of the part")
    parser.add_argument("--toy", action="store_true", help="takes seconds on a CPU; the figures mean nothing")
    parser.add_argument("--write", action="store_true", help="append the tables of all results to RESULTS.md")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"{unknown[0]}: there is no such part; allowed: {', '.join(PARTS)}")
    if not options.toy and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; allowed: --toy")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            options.results, options.scratch = Path(folder) / "gpu.jsonl", Path(folder)
        for name in options.parts or missing(options.results):
            if (time.perf_counter() - started) / 60 + options.minutes > options.total:
                print(f"{name}: not started, since it might end after --total minutes", file=sys.stderr)
                continue
            attempt(name, options)
        lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    for kind in ("ppo", "decode"):
        rows = [row for line in lines for row in line["rows"] if line["kind"] == kind]
        if rows:
            made = sorted({f"{line['machine']} at {line['commit']}" for line in lines if line["kind"] == kind})
            report(f"GPU: {kind}", f"{table(rows)}\n\nMeasured on {'; '.join(made)}.", options.write)


def missing(results: Path) -> list[str]:
    """The parts that have no line in the results yet."""
    lines = results.read_text().splitlines() if results.exists() else []
    done = {json.loads(line)["part"] for line in lines}
    return [name for name in PARTS if name not in done]


def attempt(name: str, options: argparse.Namespace) -> None:
    """Run a part and append its line to the results; a failure is printed, so that the other parts still run."""
    method = "fork" if options.toy else "spawn"
    try:
        line = isolated(measure, name, options, method=method, timeout=60 * options.minutes)
    except RuntimeError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return
    with options.results.open("a") as file:
        file.write(json.dumps({"part": name, **line}) + "\n")
    print(json.dumps(line), flush=True)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a part, as a line of the results. Runs in a subprocess."""
    started, part = time.perf_counter(), PARTS[name]
    device = "cpu" if options.toy else "cuda"
    overrides = [*part.overrides, *options.set, *(TOY if options.toy else ())]
    # one plan per new shape otherwise, 0.1 to 0.5 s each: torch prefers cuDNN's attention on Hopper
    torch.backends.cuda.enable_cudnn_sdp(False)
    if part.card and not options.toy:
        torch.cuda.set_per_process_memory_fraction(part.card * GIB / torch.cuda.get_device_properties(0).total_memory)
    world = prepare(name, options)
    about = {"machine": machine(), "commit": commit()}
    with tempfile.TemporaryDirectory() as folder:
        if part.decode:
            tokens, repeats = (4, 1) if options.toy else (128, 5)
            found = rates(world, overrides, tokens, repeats, device)
            rows = [{"model": part.shape} | {key: str(value) for key, value in row.items()} for row in found]
            return {"kind": "decode", "rows": rows, **about}
        kept = options.results.parent / name  # metrics.jsonl, a line a step: what a part that is cut off leaves
        shutil.rmtree(kept, ignore_errors=True)
        stage = make_stage(world, [*overrides, f"ppo.steps={options.steps + 1}"], kept, device)
        loaded = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        # the trainer checks the time between steps only, and one more step may take a third of it
        left = 60 * options.minutes * 0.65 - (time.perf_counter() - started)
        lines = train(stage, world.prompts, kept, max(left, 1.0) if device == "cuda" else None)
    return {"kind": "ppo", "rows": [step_row(name, part, lines, stage.ppo.rollout_batch_size, loaded)], **about}


def step_row(name: str, part: Part, lines: list[dict[str, float]], rollouts: int, loaded: int) -> dict[str, Any]:
    """Table row of a PPO part: medians and quartiles of the measured steps, and peak GPU memory."""
    keys = {
        "step (s)": "seconds",
        "generate (s)": "time/generate",
        "score (s)": "time/score",
        "update (s)": "time/update",
    }
    row: dict[str, Any] = {"part": name, "steps": len(lines)}
    row["rollouts/s"] = str(spread(rollouts / line["seconds"] for line in lines))
    row |= {title: str(spread(line[key] for line in lines)) for title, key in keys.items()}
    row["tokens"] = f"{spread(line['ppo/response_tokens'] for line in lines).median:.0f}"
    cuda = torch.cuda.is_available()
    peaks = {
        "loading": loaded,
        "step": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
    }
    return row | {f"peak {what} (GiB)": f"{peak / GIB:.2f}" for what, peak in peaks.items()}


def prepare(name: str, options: argparse.Namespace) -> World:
    """The world of a part. A missing one is made in a subprocess, so that its memory does not count for the part."""
    part = PARTS[name]
    if part.real and options.smollm2 and not options.toy:
        folder = options.scratch / "real"
        return isolated(real_world, folder, list(options.smollm2), part.prompts[1], method="spawn")
    shape, device, dtype = part.shape, "cuda", torch.bfloat16
    if options.toy:
        shape, device, dtype = "toy_neox" if "neox" in part.shape else "toy", "cpu", torch.float32
    eos = ending_halfway(shape, 128) if part.decode else NEVER
    folder = options.scratch / f"{shape}-{'decode' if part.decode else 'ppo'}-{part.rows}"
    if (folder / "prompts.json").exists():
        return World(folder)
    method = "fork" if options.toy else "spawn"
    if not options.toy:
        make_room(options.scratch)
    return isolated(make_world, folder, SHAPES[shape], part.prompts, eos, part.rows, device, dtype, method=method)


def make_room(scratch: Path) -> None:
    """Delete the worlds made before: those of 7B and 20B together may not fit on the disk."""
    for found in scratch.glob("*/prompts.json"):
        if World(found.parent).reward.is_dir():
            shutil.rmtree(found.parent)


def real_world(folder: Path, overrides: list[str], longest: int) -> World:
    """A world of the model and data that `overrides` name, with the prompts of at most `longest` tokens."""
    world = World(folder)
    if (folder / "prompts.json").exists():
        return world
    config, settings = composed(["model=smollm2_135m", "data=alpaca", *overrides])
    tokenizer = load_tokenizer(settings.model)
    prompts = instantiate(config.data, "data").load("prompts")["prompt"]
    kept = [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) <= longest]
    return save_world(world, load_causal_lm(settings.model, tokenizer), tokenizer, kept)


if __name__ == "__main__":
    main()
