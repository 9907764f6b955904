"""Our side of `peer.py`: prints a JSON line per PPO step after the warm-up. Also makes the world that both sides read.

`run` blocks after each step until it reads a line from standard input.

peer_ours.py make FOLDER SHAPE PROMPT_TOKENS [EOS_LOGIT]
peer_ours.py run FOLDER STEPS [OVERRIDE ...]
"""

import sys
import tempfile
from pathlib import Path

from common import emit, peak_rss, turn
from stage import make_stage, train
from world import NEVER, SHAPES, World, make_world


def run(folder: str, steps: str, *overrides: str) -> None:
    """Train `steps` measured steps on the world in `folder`, and print times and memory."""
    imported, world = peak_rss(), World(Path(folder))
    with tempfile.TemporaryDirectory() as out:
        stage = make_stage(world, [*overrides, f"ppo.steps={int(steps) + 1}"], Path(out))
        for line in train(stage, world.prompts, Path(out), after=lambda _: turn()):
            phases = {phase: line[f"time/{phase}"] for phase in ("generate", "score", "update")}
            emit("step", seconds=line["seconds"], cpu=line["cpu"], **phases, tokens=line["ppo/response_tokens"],
                 reward=line["ppo/reward"])  # fmt: skip
    emit("memory", peak=peak_rss(), imported=imported)


def make(folder: str, shape: str, prompt_tokens: str, eos_logit: str = str(NEVER)) -> None:
    """Make a world whose prompts all have the same length."""
    make_world(Path(folder), SHAPES[shape], (int(prompt_tokens), int(prompt_tokens)), float(eos_logit))


if __name__ == "__main__":
    {"run": run, "make": make}[sys.argv[1]](*sys.argv[2:])
