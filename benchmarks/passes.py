"""Forward passes three ways, in turn: rows padded, laid end to end, and with the last block only where it is read.

    python benchmarks/passes.py                      the farm's model and 3.7M parameters on this machine
    python benchmarks/passes.py --shapes 110M --threads 2
    python benchmarks/passes.py --dtype bfloat16     with matrix products in bfloat16
    python benchmarks/passes.py --toy

A whole model is trained to score texts by their last token, or reads the states that predict the responses, once with
gradients and once without. Times are of the processor, of a forward pass and of a backward pass, if there is one.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import isolated, parser_of, report, spread, table
from transformers import AutoConfig, AutoModelForCausalLM
from world import EOS, PAD, SHAPES, UNK

from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences, length_buckets
from rlhf.seeding import generator

WAYS = ("padded", "end to end", "read states only")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["farm", "3.7M"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, nargs=2, default=(6, 12), help="shortest and longest, in tokens")
    parser.add_argument("--response", type=int, nargs=2, default=(8, 30), help="shortest and longest, in tokens")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    options = parser.parse_args()
    if options.toy:
        options = argparse.Namespace(**{**vars(options), "shapes": ["toy"], "rows": 4, "repeats": 2, "threads": 1})
    rows = [row for shape in options.shapes for row in isolated(measure, shape, options)]
    lengths = f"prompts of {options.prompt}, responses of {options.response} tokens"
    report(f"Passes: {options.rows} texts, {lengths}, {options.dtype}", table(rows), options.write)


def measure(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table for one shape."""
    torch.set_num_threads(options.threads)
    roles, batch = scorer(shape, options.dtype), random_batch(SHAPES[shape]["vocab_size"], options)
    assert roles.unpadded
    known = roles._row_modules["base"]
    rows = []
    for name, run in passes(roles, batch).items():
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(options.repeats + 1):
            for way in WAYS:
                roles._unpadded["base"] = way != "padded"
                roles._row_modules["base"] = known if way == "read states only" else []
                started = time.process_time()
                run()
                if repeat:  # the first is a warm-up
                    seconds[way].append(time.process_time() - started)
        ratios = {f"{way} is faster by": ratio(seconds["padded"], seconds[way]) for way in WAYS[1:]}
        rows.append({"model": shape, "pass": name, **{f"{way} (s)": spread(seconds[way]) for way in WAYS}, **ratios})
    return rows


def ratio(slow: list[float], fast: list[float]) -> str:
    """The median ratio of adjacent measurements."""
    return f"{spread(one / other for one, other in zip(slow, fast, strict=True)).median:.2f}x"


def scorer(shape: str, dtype: str) -> Roles:
    """A whole model with a scalar head, with random weights in float32 and products in `dtype`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[shape], pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
    roles = Roles(AutoModelForCausalLM.from_config(config).eval(), getattr(torch, dtype))
    roles.table["reward"] = Role("base", None)
    roles.add_head("reward", zero=False)
    roles.train_only("reward")
    return roles


def random_batch(vocabulary: int, options: argparse.Namespace) -> Sequences:
    """Random texts, with lengths uniform between the given ones."""
    stream = generator(0, "benchmark passes")

    def texts(shortest: int, longest: int) -> list[list[int]]:
        lengths = torch.randint(shortest, longest + 1, (options.rows,), generator=stream).tolist()
        return [torch.randint(UNK + 1, vocabulary, (n,), generator=stream).tolist() for n in lengths]

    return Sequences.from_lists(texts(*options.prompt), texts(*options.response))


def passes(roles: Roles, batch: Sequences) -> dict[str, Callable[[], None]]:
    """The passes by name. Where rows are padded, those of similar length go through together, as in a stage."""

    def groups() -> list[Sequences]:
        if roles.unpadded:
            return [batch]
        return [batch.rows(group) for group in length_buckets(batch.lengths.tolist(), int(batch.lengths.sum()) // 4)]

    def score() -> None:
        for part in groups():
            roles.last_token_scores("reward", part).sum().backward()
        roles.zero_grad()

    def learn() -> None:
        for part in groups():
            roles.states("reward", part, part.predicting).square().sum().backward()
        roles.zero_grad()

    def read() -> None:
        with torch.no_grad():
            for part in groups():
                roles.states("reward", part, part.predicting)

    return {"last token, trained": score, "responses, trained": learn, "responses, frozen": read}


if __name__ == "__main__":
    main()
