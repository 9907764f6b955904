"""A PPO stage as `rlhf` composes it, on a world in a folder or on a random model in memory, and its measured steps."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase
from world import World, random_roles, word_tokenizer

import rlhf.sweep.resolvers  # noqa: F401  (Hydra composes with them)
from rlhf import root
from rlhf.distributed.strategies import SingleDevice
from rlhf.models.assembly import ppo_roles
from rlhf.models.loading import load_tokenizer
from rlhf.models.roles import Roles
from rlhf.pipeline.allocation import keep_freed_memory
from rlhf.pipeline.config import instantiate, settings_of
from rlhf.pipeline.numerics import settle_numerics
from rlhf.pipeline.quiet import quieten
from rlhf.scorers import Context
from rlhf.scorers.reward_model import RewardModelScorer
from rlhf.settings import Settings, is_quantized
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.ppo import PPO, make_ppo
from rlhf.tracking.metrics_file import JsonLines, read_metrics

FIXED = (
    "model=custom", "model.dtype=float32", "data=farm", "generation.batch_size=256", "generation.temperature=1",
    "ppo.eval_every=1000000", "ppo.schedule=constant", "ppo.warmup_steps=0", "ppo.missing_eos_penalty=0",
    "ppo.reference_every=1000000",
)  # fmt: skip


def composed(overrides: Sequence[str]) -> tuple[DictConfig, Settings]:
    """The configuration that `rlhf` composes from these overrides, and its typed settings."""
    with initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
        config = compose("config", list(overrides))
    return config, settings_of(config)


def make_stage(world: World, overrides: Sequence[str], folder: Path, device: str = "cpu", reward: bool = True) -> PPO:
    """A PPO stage on a world, assembled as in `rlhf.pipeline.run`; with `reward=False` every score is 0."""
    config, settings = composed([*FIXED, f"model.name_or_path={world.sft}", *overrides])
    _prepare(settings)
    tokenizer = load_tokenizer(settings.model)
    quantization = settings.quantization if is_quantized(settings.quantization) else None
    roles = ppo_roles(settings, tokenizer, world.sft, world.reward if reward else None, quantization).to(device)
    return _stage(config, settings, roles, tokenizer, folder)


def random_stage(shape: Mapping[str, Any], overrides: Sequence[str], folder: Path, device: str) -> PPO:
    """A PPO stage with LoRA on a random model of this shape, a value of `SHAPES`, drawn on `device`."""
    config, settings = composed([*FIXED, "model.name_or_path=null", *overrides])
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, config=dict(shape)))
    _prepare(settings)
    return _stage(config, settings, random_roles(shape, settings, device), word_tokenizer(shape["vocab_size"]), folder)


def _prepare(settings: Settings) -> None:
    """What `rlhf` does before it loads a model."""
    quieten()
    lightning.seed_everything(settings.seed, verbose=False)
    settle_numerics(False)
    keep_freed_memory()


def _stage(
    config: DictConfig, settings: Settings, roles: Roles, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> PPO:
    context = Context(None, tokenizer, roles, 0.0, settings.ppo.microbatch_tokens)  # type: ignore[arg-type]
    scorer: Any = RewardModelScorer(context)
    if "reward" not in roles.table:
        scorer = lambda rollouts: torch.zeros(len(rollouts.prompts), device=roles.device)  # noqa: E731
    samples = folder / "samples.jsonl"
    return make_ppo(settings, roles, tokenizer, scorer, instantiate(config.kl, "kl"), lambda *_: ({}, []), samples)


class Clock(lightning.Callback):
    """Collects the metrics of each step with its wall time (`seconds`) and its processor time (`cpu`).

    The first step is a warm-up, marked `warm_up`, whose wall time is that of its phases. `after` is called with each
    step's line and is not measured; training ends when it returns False.
    """

    def __init__(self, folder: Path, after: Callable[[dict[str, Any]], object]) -> None:
        self.folder, self.after = folder, after
        self.started: tuple[float, float] | None = None
        self.lines: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Record the step that ends, and start the clock for the next."""
        wall, cpu = time.perf_counter(), time.process_time()
        line = read_metrics(self.folder)[-1]
        if self.started is None:
            phases = sum(value for key, value in line.items() if key.startswith("time/"))
            line |= {"seconds": phases, "cpu": 0.0, "warm_up": True}
        else:
            line |= {"seconds": wall - self.started[0], "cpu": cpu - self.started[1], "warm_up": False}
        self.lines.append(line)
        if self.after(line) is False:
            trainer.should_stop = True
        self.started = time.perf_counter(), time.process_time()


def train(
    stage: PPO,
    prompts: Sequence[str],
    folder: Path,
    after: Callable[[dict[str, Any]], object] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train to the last step, or until `after` returns False; the lines of the steps after the warm-up (`Clock`)."""
    clock, settings = Clock(folder, after), stage.ppo
    trainer = lightning.Trainer(
        accelerator="gpu" if stage.roles.device.type == "cuda" else "cpu", devices=1, max_epochs=1, callbacks=[clock],
        logger=[JsonLines(folder)], enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        inference_mode=False, log_every_n_steps=1, strategy=SingleDevice(),
    )  # fmt: skip
    batches = SeededBatches(len(prompts), settings.rollout_batch_size, stage.config.seed, settings.steps)
    trainer.fit(stage, loader(prompts, list, batches))
    return [line for line in clock.lines if not line["warm_up"]]
