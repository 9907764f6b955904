"""Output folders with tiny finished runs: an SFT and a reward model in the cache, and PPO runs that use them."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from rlhf.models.export import save_adapter, save_model
from rlhf.tracking.summary import write_summary
from tests.helpers.composed_config import composed
from tests.helpers.tiny_models import tiny_lora, tiny_roles, word_tokenizer

TEMPLATE = {"with_input": "w5 {instruction} {input} w6", "without_input": "w5 {instruction} w6"}
METRICS = {
    "eval/win_rate": 0.5,
    "eval/reward": 0.25,
    "time/evaluate": 1.0,
    "eval/length_controlled_win_rate": float("nan"),
}


def run_config(*overrides: str) -> dict[str, Any]:
    """The resolved configuration of a run on tiny models with a template of single words."""
    config = composed("data=alpaca", "evaluation.max_new_tokens=6", *overrides)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return {**plain, "data": {**plain["data"], "template": TEMPLATE}}


def finished_outputs(folder: Path, *overrides: str) -> SimpleNamespace:
    """Write `sft` and `reward` in the cache, `ppo` on them, `other` with another policy, `full` without an adapter."""
    roles, tokenizer, settings = tiny_roles(), word_tokenizer(), run_config(*overrides)
    runs = SimpleNamespace(sft=folder / "cache/sft-0", reward=folder / "cache/reward-0", roles=roles)
    runs.ppo, runs.other, runs.full = (folder / "study" / name for name in ("ppo", "other", "full"))
    base = runs.sft / "model"
    save_model(roles.copy_trunk("reference"), tokenizer, base)
    save_model(roles.copy_trunk("policy"), tokenizer, runs.full / "model")
    for run, role in ((runs.reward, "reward"), (runs.ppo, "policy"), (runs.other, "value")):
        if role == "value":
            roles.heads.pop("value")
        save_adapter(roles, role, tiny_lora(), base, tokenizer, run / "model")
    for run, stage, metrics in (
        (runs.sft, "sft", {"sft/perplexity": 3.0}),
        (runs.reward, "reward", {"reward/accuracy": 0.75, "reward/baseline": 0.5}),
        (runs.ppo, "ppo", METRICS),
        (runs.other, "ppo", METRICS),
        (runs.full, "ppo", METRICS),
    ):
        more = {"sft_metrics": {"eval/win_rate": 0.25}, "reward_model": "reward-0"} if stage == "ppo" else {}
        write_summary(run, metrics, settings, time.time(), stage=stage, **more)
    return runs


def move_outputs(runs: SimpleNamespace, folder: Path) -> SimpleNamespace:
    """Move all outputs to another folder; return the new paths."""
    shutil.move(runs.sft.parent.parent, folder)
    places = {
        name: folder / path.relative_to(runs.sft.parent.parent) for name, path in vars(runs).items() if name != "roles"
    }
    return SimpleNamespace(**places, roles=runs.roles)
