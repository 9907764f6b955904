"""Our PPO against TRL's (1.12.0) in alternation, on the same weights, prompts, reward, LoRA and minibatches.

    python benchmarks/peer.py                        the cases of 3.7M parameters, about 10 minutes on two cores
    python benchmarks/peer.py --cases large          110M parameters, about 10 minutes
    python benchmarks/peer.py --dtype bfloat16       both in bfloat16: TRL by autocast, which is its own default
    python benchmarks/peer.py --write                also append the tables to RESULTS.md

The systems themselves differ: TRL trains a full value model (it has no adapter for it), ours an adapter on the shared
base; TRL's reward model is a separate model, ours another adapter that gives the same scores. Each side is a
subprocess. They alternate step by step, so that changes in the machine's speed affect both, and each ratio is one of
two adjacent steps. The first step is a warm-up. TRL runs in a virtual environment that this script makes at --venv,
with the versions of torch, transformers and peft that are installed here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import MIB, Turns, report, run_script, spread, table

TRL = "1.12.0"
TIMEOUT = 3600.0
Side = list[list[dict[str, Any]]]  # the measurements of one side, round by round


@dataclass(frozen=True)
class Case:
    """A setting in which both sides are measured.

    Attributes:
        about: its name in the tables.
        shape: key of `SHAPES`.
        tokens: maximum length of a response.
        epochs: PPO epochs per step.
        eos: logit of EOS; None for responses that never end before `tokens`.
        rounds: pairs of processes.
        steps: measured steps of a process.
        rollouts: rollouts per step.
        minibatch: rows of a minibatch.
        prompt: length of every prompt, in tokens.
        ours: overrides of our configuration.
        target: the ratio that is aimed at.
    """

    about: str
    shape: str = "3.7M"
    tokens: int = 48
    epochs: int = 1
    eos: float | None = None
    rounds: int = 1
    steps: int = 12
    rollouts: int = 64
    minibatch: int = 16
    prompt: int = 32
    ours: tuple[str, ...] = ()
    target: str = ""


CASES = {
    "forced_1": Case("3.7M, 48 tokens, 1 epoch", target="1.5x"),
    "forced_4": Case("3.7M, 48 tokens, 4 epochs", epochs=4, target="1.5x"),
    "natural": Case("3.7M, ending by themselves, at most 96 tokens, 1 epoch", tokens=96, eos=3.55, target="2.5x"),
    "trunk_head": Case(
        "3.7M, 48 tokens, 1 epoch, ours with ppo.value_model=trunk_head",
        ours=("ppo.value_model=trunk_head",),
        target="3x",
    ),
    "large": Case("110M, 48 tokens, 1 epoch", "110M", steps=4, target="2x, memory 0.5x"),
    "toy": Case("toy", "toy", tokens=8, eos=3.0, rounds=1, steps=1, rollouts=16, minibatch=8, prompt=8),
}
DEFAULT = ("forced_1", "forced_4", "natural")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT)
    parser.add_argument("--rounds", type=int, help="pairs of processes (default: the case's own number)")
    parser.add_argument("--steps", type=int, help="measured steps of a process")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each side")
    parser.add_argument("--venv", type=Path, default=Path.home() / ".cache" / "rlhf-bench" / f"trl-{TRL}")
    parser.add_argument(
        "--ours", nargs="*", default=(), help="further overrides of our configuration, such as ppo.value_model=full"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    parser.add_argument("--write", action="store_true", help="append the tables to RESULTS.md")
    options = parser.parse_args()
    python = trl_environment(options.venv)
    rates, phases = [], []
    for name in options.cases:
        ours, trl = compare(CASES[name], python, options)
        rates.append(rate_row(CASES[name], ours, trl))
        phases += [phase_row(CASES[name], side, rounds) for side, rounds in (("ours", ours), ("TRL", trl))]
        print(table(rates[-1:]), table(phases[-2:]), sep="\n\n", flush=True)
    title = f"Against TRL {TRL}, {options.threads} threads each, {options.dtype}"
    report(title, f"{table(rates)}\n\n{table(phases)}", options.write)


def trl_environment(folder: Path) -> Path:
    """Python of the environment with TRL, which is made if it does not exist."""
    python = folder / "bin" / "python"
    complete = folder / f"trl-{TRL}.complete"
    if complete.exists():
        return python
    print(f"making an environment for TRL {TRL} at {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    ours = {name: version(name).partition("+")[0] for name in ("torch", "transformers", "peft")}
    # torch first, so that the resolver keeps the wheel that this machine's pip prefers
    pinned = {name: f"{name}=={number}" for name, number in ours.items()}
    for pins in ([pinned["torch"]], [pinned["transformers"], pinned["peft"], f"trl=={TRL}"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
    complete.touch()
    return python


def compare(case: Case, python: Path, options: argparse.Namespace) -> tuple[Side, Side]:
    """Measure both sides in alternation on one world; returns the measurements of ours and of TRL."""
    rounds, steps = options.rounds or case.rounds, options.steps or case.steps
    ours: Side = []
    trl: Side = []
    overrides = [
        "lora=r8", "divergence=kl", "kl.coef=0.05", "ppo.lr=1e-5", "ppo.whiten_rewards=false",
        f"ppo.rollout_batch_size={case.rollouts}", f"ppo.minibatch_size={case.minibatch}",
        f"ppo.epochs={case.epochs}", f"generation.max_new_tokens={case.tokens}",
        f"generation.batch_size={case.rollouts}", f"model.dtype={options.dtype}", *case.ours, *options.ours,
    ]  # fmt: skip
    shape = [str(n) for n in (case.rollouts, case.minibatch, case.epochs, case.tokens)] + [options.dtype]
    how = {"threads": options.threads, "timeout": TIMEOUT}
    with tempfile.TemporaryDirectory() as folder:
        eos = [] if case.eos is None else [str(case.eos)]
        run_script(sys.executable, "peer_ours.py", "make", folder, case.shape, str(case.prompt), *eos, **how)
        for number in range(rounds):
            with (
                Turns(sys.executable, "peer_ours.py", "run", folder, str(steps), *overrides, **how) as our_side,
                Turns(python, "peer_trl.py", folder, str(steps), *shape, **how) as their_side,
            ):
                for _ in range(1 + steps):  # the first is a warm-up
                    our_side.step()
                    their_side.step()
                ours.append(our_side.finish())
                trl.append(their_side.finish())
            print(f"{case.about}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return ours, trl


def column(rounds: Side, key: str) -> list[float]:
    """The value `key` of every measured step."""
    return [row[key] for measured in rounds for row in measured if row["kind"] == "step" and row[key] is not None]


def memory(rounds: Side, key: str = "peak") -> list[float]:
    """Peak resident set size of every process, in MiB; `imported`: that after the imports."""
    return [row[key] / MIB for measured in rounds for row in measured if row["kind"] == "memory"]


def rate_row(case: Case, ours: Side, trl: Side) -> dict[str, Any]:
    """Table row of rollouts per second and peak memory, with the ratios of adjacent steps and of paired processes."""

    def ratios(above: Iterable[float], below: Iterable[float]) -> str:
        return f"{spread(a / b for a, b in zip(above, below, strict=True))}x"

    return {
        "case": case.about,
        "ours (rollouts/s)": spread(case.rollouts / s for s in column(ours, "seconds")),
        "TRL": spread(case.rollouts / s for s in column(trl, "seconds")),
        "ratio": ratios(column(trl, "seconds"), column(ours, "seconds")),
        "target": case.target or "–",
        "memory ours (MiB)": f"{spread(memory(ours)).median:.0f}",
        "memory TRL": f"{spread(memory(trl)).median:.0f}",
        "memory ratio": ratios(memory(ours), memory(trl)),
    }


def phase_row(case: Case, side: str, rounds: Side) -> dict[str, Any]:
    """Table row of one side: wall seconds of the phases of a step, processor seconds, and response length."""
    phases = {f"{key} (s)": spread(column(rounds, key)) for key in ("generate", "score", "update")}
    phases |= {"step (s)": spread(column(rounds, "seconds")), "processor (s)": spread(column(rounds, "cpu"))}
    imported = spread(memory(rounds, "imported")).median
    lengths = f"{spread(column(rounds, 'tokens')).median:.1f}"
    return {"case": f"{case.about}: {side}", **phases, "tokens": lengths, "imports (MiB)": f"{imported:.0f}"}


if __name__ == "__main__":
    main()
