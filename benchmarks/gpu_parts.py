"""The parts of `gpu.py`, in order of value, and the tables of their results."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from common import spread
from gpu_checks import CHECKS
from gpu_probe import PROBES, rates
from gpu_profile import profiled_decoding, profiled_step
from gpu_runner import END, Part
from gpu_steps import PHASES, decoding, ppo_steps

# conf/ppo/paper.yaml, conf/generation/paper.yaml and conf/lora/paper.yaml
PAPER = (
    "ppo=paper", "generation=paper", "lora=paper", "divergence=kl", "model.dtype=bfloat16",
    "ppo.microbatch_tokens=8192", "generation.cuda_graphs=auto", "generation.batch_size=256",
)  # fmt: skip
CARD = (
    "lora=r8", "lora.target_modules=[query_key_value,dense]", "divergence=kl", "model.dtype=bfloat16", "ppo.epochs=2",
    "model.gradient_checkpointing=true", "ppo.rollout_batch_size=8", "ppo.minibatch_size=8", "generation.batch_size=8",
    "ppo.microbatch_tokens=256", "generation.max_new_tokens=32", "quantization=nf4",
)  # fmt: skip
SMALL = (
    "lora=r8", "divergence=kl", "model.dtype=bfloat16", "ppo.rollout_batch_size=256", "ppo.minibatch_size=128",
    "ppo.epochs=2", "ppo.microbatch_tokens=32768", "generation.max_new_tokens=128", "generation.batch_size=256",
    "generation.cuda_graphs=auto",
)  # fmt: skip
COMPILED = "model.compile=true"
BRIEF = ("ppo.rollout_batch_size=64", "ppo.minibatch_size=64", "ppo.epochs=1", "ppo.microbatch_tokens=4096")
FEW = ("ppo.rollout_batch_size=64", "ppo.minibatch_size=32", "generation.batch_size=64", "quantization=nf4")


def parts(settings: Sequence[str]) -> dict[str, Part]:
    """All parts by name, with more overrides for those that train or decode. Their limits sum to 15 minutes."""
    small = {"shape": "smollm2_135m", "overrides": [*SMALL, *settings], "prompts": (32, 96), "rows": 256}
    seven = {"shape": "llama_7b", "prompts": (32, 192), "rows": 256}
    twenty = {"shape": "gpt_neox_20b", "prompts": (16, 32), "rows": 32, "card": 23.0}
    steps = partial(partial, ppo_steps)
    compiled = {**small, "overrides": [*small["overrides"], COMPILED]}
    brief = {**small, "overrides": [*small["overrides"], *BRIEF]}
    return {
        "rates": Part({"rates": rates}, 4, 20),
        "smoke": Part(CHECKS, 20, 150),
        "probe": Part(PROBES, 15, 80),
        "smollm2": Part({"steps": steps(**small)}, 15, 45),
        "llama_7b_bf16": Part({"steps": steps(overrides=[*PAPER, *settings], **seven)}, 70, 140),
        "decode_smollm2": Part({"engines": partial(decoding, limit=128, **small)}, 20, 60),
        "llama_7b_nf4": Part({"steps": steps(overrides=[*PAPER, *FEW, *settings], **seven)}, 50, 100),
        "neox_20b_nf4": Part({"steps": steps(overrides=[*CARD, *settings], **twenty)}, 40, 60),
        "smollm2_compiled": Part({"steps": steps(**compiled)}, 60, 100),
        "llama_7b_compiled": Part({"steps": steps(overrides=[*PAPER, COMPILED, *settings], **seven)}, 90, 215),
        "profile": Part(
            {
                "smollm2": partial(profiled_step, **brief),
                "smollm2 compiled": partial(profiled_step, **{**brief, "overrides": [*brief["overrides"], COMPILED]}),
                "decoding 7B": partial(profiled_decoding, overrides=PAPER, **seven),
                "decoding smollm2": partial(profiled_decoding, **small),
                "smollm2 compiled, all 256 rollouts": partial(profiled_step, **compiled),
            },
            20,
            90,
        ),
    }


def tables(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables, by title; a title without rows is left out."""
    found = {
        "PPO: measured, and predicted from the rates of products and copies": ppo_rows(lines),
        "Decoding": decoding_rows(lines),
        "Checks, and items that failed": [
            {"part": line["part"], "item": line["item"], "ok": line["ok"], "gap": line.get("error", line.get("gap"))}
            for line in lines
            if line["kind"] == END and (line["part"] == "smoke" or not line["ok"])
        ],
    }  # fmt: skip
    return {title: rows for title, rows in found.items() if rows}


def ppo_rows(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per part and phase: medians of the measured steps, or the warm-up where there is nothing else."""
    rows = []
    for part in dict.fromkeys(line["part"] for line in lines if line["kind"] == "step"):
        own = [line for line in lines if line["part"] == part]
        every = [line for line in own if line["kind"] == "step"]
        measured = [line for line in every if not line["warm_up"]]
        steps = measured or every
        loaded = next(line for line in reversed(own) if line["kind"] == "loaded")
        for phase in ("loading", *PHASES, "step"):
            lap = (
                [line["seconds" if phase == "step" else phase] for line in steps]
                if phase != "loading"
                else [loaded["seconds"]]
            )
            peaks = [line["peak"] for line in own if line.get("phase", "loading") == phase and "peak" in line]
            rows.append({
                "part": part, "phase": phase, "steps": str(len(measured)) if measured else "warm-up",
                "seconds": str(spread(lap)), "predicted": number(loaded["predicted"]["seconds"], phase),
                "peak (GiB)": f"{max(peaks):.2f}" if peaks else "–",
                "predicted (GiB)": number(loaded["predicted"]["gib"], phase),
                "rollouts/s": f"{spread(x['rollouts'] / x['seconds'] for x in steps)}" if phase == "step" else "",
            })  # fmt: skip
    return rows


def number(found: Mapping[str, float], key: str) -> str:
    """A predicted number; the sum of all for a whole step."""
    value = sum(found.values()) if key == "step" and "loading" not in found else found.get(key)
    return f"{value:.3g}" if value else "–"


def decoding_rows(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per engine."""
    laps = [line for line in lines if line["kind"] == "decoded"]
    rows = []
    for part, engine in dict.fromkeys((line["part"], line["engine"]) for line in laps):
        own = [line for line in laps if (line["part"], line["engine"]) == (part, engine)]
        kept = [line["rate"] for line in own if not line["warm_up"]] or [line["rate"] for line in own]
        rows.append({"part": part, "engine": engine, "tokens/s": str(spread(kept)), "laps": len(kept)})
    return rows
