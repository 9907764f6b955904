"""This project on one GPU in 15 minutes: every path against the CPU, attention kernels, PPO at real sizes, decoding.

    python benchmarks/gpu.py --results gpu.jsonl                 every part that has not ended in gpu.jsonl yet
    python benchmarks/gpu.py --results gpu.jsonl --seconds 270 probe:varlen llama_7b_bf16
    python benchmarks/gpu.py --toy                               all of it on a CPU; the figures mean nothing

Parts run in order, as long as their time is within --seconds; each is cut off at its limit. Every line is written as it
comes, so that a part that is cut off leaves what it measured, and the same command with the same file runs what is
missing. Weights are random and drawn on the GPU. The part neox_20b_nf4 is limited to 23 GiB by PyTorch, which is what a
24 GB card has left besides its CUDA context.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import report, table
from gpu_runner import Bench, hidden_bitsandbytes, read, run_parts, working_method

TABLES = 5  # seconds that the tables take at the end


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART[:WORD]", help="only items whose name contains WORD")
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"), help="JSON lines; appended to")
    parser.add_argument("--seconds", type=float, default=840, help="of the whole command, imports included")
    parser.add_argument("--set", nargs="*", default=(), metavar="KEY=VALUE", help="more overrides of PPO and decoding")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--tables", action="store_true", help="measure nothing; the tables of --results")
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with hidden_bitsandbytes():
        from gpu_parts import parts, tables  # imports torch, transformers, lightning and this project
    known = parts(options.set)
    rates = known.pop("rates")
    chosen = []
    for given in options.parts or known:
        name, _, word = given.partition(":")
        if name not in known:
            parser.error(f"{name}: there is no such part; allowed: {', '.join(known)}")
        chosen.append((name, known[name].only(word)))
    if options.toy and options.results == parser.get_default("results"):
        options.results = Path(tempfile.mkdtemp()) / "gpu.jsonl"
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.tables:
        show(tables(read(options.results)), options)
        return
    bench = Bench(options.results, "cpu" if options.toy else "cuda", options.toy, started + options.seconds - TABLES)
    bench.say("imported", seconds=round(time.monotonic() - started, 1))
    method = working_method(rates, replace(bench, part="rates"))
    if options.toy:  # what takes seconds on a GPU may take minutes on a busy CPU
        chosen = [(name, replace(part, needs=0, limit=options.seconds)) for name, part in chosen]
    run_parts(chosen, bench, method)
    show(tables(read(options.results)), options)


def show(found: Mapping[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print tables, and name the machines and commits that the lines of the results file came from."""
    made = {f"{x['machine']}, at {x['commit']}": None for x in read(options.results) if "commit" in x}
    for title, rows in found.items():
        report(title, f"{table(rows)}\n\nMeasured on {'; '.join(made)}.", options.write)


if __name__ == "__main__":
    main()
