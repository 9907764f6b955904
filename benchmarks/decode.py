"""The native decoding engine against Hugging Face `generate`, on the same weights, prompts and adapter.

    python benchmarks/decode.py                      3.7M and 110M parameters on this machine
    python benchmarks/decode.py --shapes 110M --dtype bfloat16 --threads 2
    python benchmarks/decode.py --toy

Engines: native (adapter merged into copies of the weights, one cache buffer, finished rows are dropped), `generate` as
peft runs it (adapter beside the matrices), and `generate` with the adapter merged. Tokens are those of the responses,
including EOS.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import isolated, parser_of, report, spread, table
from stage import make_stage
from world import NEVER, SHAPES, make_world

from rlhf.models.roles import Roles
from rlhf.models.tokenizing import encode
from rlhf.rollout.engine import Engine, GenerationRequest
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.seeding import generator
from rlhf.stages.ppo import PPO

ENGINES = ("native", "generate", "generate, merged")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["3.7M", "110M"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, nargs=2, default=(16, 32), help="shortest and longest, in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="maximum length of a response")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.toy:
        toy = {"shapes": ["toy"], "batch": 4, "prompt": (4, 8), "tokens": 8, "repeats": 1, "threads": 1}
        options = argparse.Namespace(**{**vars(options), **toy})
    rows = []
    for shape in options.shapes:
        for ending, eos in (("at the limit", NEVER), ("by themselves", ending_halfway(shape, options.tokens))):
            found = isolated(measure, shape, eos, options)
            rows += [{"model": shape, "responses end": ending, **row} for row in found]
    title = f"Decoding: {options.batch} prompts, at most {options.tokens} tokens, {options.dtype}"
    report(title, table(rows), options.write)


def ending_halfway(shape: str, limit: int) -> float:
    """The logit of EOS with which responses are about half as long as `limit`: EOS has probability 1 / (0.62 · limit).

    The other logits are about 0, so their exponentials sum to about the size of the vocabulary.
    """
    return math.log(SHAPES[shape]["vocab_size"] / (0.62 * limit))


def measure(shape: str, eos: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table for one world, on the CPU."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), SHAPES[shape], tuple(options.prompt), eos, options.batch)
        overrides = ["lora=r8", f"model.dtype={options.dtype}"]
        stage = make_stage(world, overrides, world.folder)
        speeds: dict[str, list[float]] = {name: [] for name in ENGINES}
        seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
        for repeat, name, lap, tokens in laps(stage, world.prompts, options.tokens, options.repeats):
            if repeat:  # the first is a warm-up
                seconds[name].append(lap)
                speeds[name].append(tokens / lap)
    native = spread(speeds["native"]).median
    return [
        {
            "engine": name,
            "tokens/s": spread(speeds[name]),
            "seconds": spread(seconds[name]),
            "native is faster by": f"{native / spread(speeds[name]).median:.2f}x",
        }
        for name in ENGINES
    ]


def laps(stage: PPO, texts: Sequence[str], limit: int, repeats: int) -> Iterator[tuple[int, str, float, int]]:
    """Decode one batch with each engine in turn: repeat (0 is a warm-up), engine, seconds, tokens."""
    roles, tokenizer = stage.roles.eval(), stage.tokenizer  # adapters' dropout off, for `generate` too
    prompts = encode(tokenizer, texts)
    reference = TransformersEngine(tokenizer.eos_token_id, tokenizer.pad_token_id)
    for repeat in range(repeats + 1):
        for name in ENGINES:
            engine: Engine = stage.engine if name == "native" else reference
            stream = generator(0, "benchmark decoding", repeat, roles.device.type)
            with using_adapter(roles, merged=name.endswith("merged")) as role:
                started = time.perf_counter()
                lengths = engine.generate(roles, role, GenerationRequest(prompts, limit, 1.0, stream)).lengths.cpu()
                lap = time.perf_counter() - started
            yield repeat, name, lap, int(lengths.sum())


@contextmanager
def using_adapter(roles: Roles, merged: bool) -> Iterator[str]:
    """The role to decode: the policy, or the base with the policy's adapter merged into it inside the block."""
    if not merged:
        yield "policy"
        return
    with roles.merged("policy"):
        yield "reference"


if __name__ == "__main__":
    main()
