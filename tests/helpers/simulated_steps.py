"""A program: steps of every stage on a simulated device. Prints a JSON object of counted host syncs.

python -m tests.helpers.simulated_steps FOLDER
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import rlhf.stages.evaluation as evaluation
from rlhf.models.export import save_adapter, save_model
from rlhf.rollout.factory import make_engine
from rlhf.rollout.sample import rollout
from rlhf.seeding import generator
from rlhf.settings import LoraSettings
from rlhf.stages.base import Stage
from rlhf.stages.ppo import PPO
from tests.helpers import ppo_stages, supervised_stages
from tests.helpers.simulated_cuda import (
    CUDA,
    MixedDevicesError,
    SimulatedDevice,
    SimulatedTensor,
    moved,
    simulate,
    syncs,
)
from tests.helpers.tiny_models import TARGETS, tiny_lora, tiny_model, tiny_roles, word_tokenizer

LORA = LoraSettings(r=4, alpha=8.0, dropout=0.1, target_modules=TARGETS["llama"])


def on_device(stage: Stage) -> Stage:
    """A stage on the simulated device, with an optimiser and without a trainer."""
    moved(stage)
    stage._device = CUDA
    stage._trainer = SimpleNamespace(global_step=1, loggers=[], state=SimpleNamespace(fn="validate"))  # type: ignore[assignment]
    optimizer = stage.configure_optimizers()["optimizer"]
    stage.optimizers = lambda: optimizer  # type: ignore[method-assign]
    stage.lr_schedulers = lambda: SimpleNamespace(step=lambda: None)  # type: ignore[method-assign]
    # autograd asks for the device's streams: gradients are zero, and a mix in a backward pass is not found
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    stage.manual_backward = lambda loss: give_zero_gradients(trained)  # type: ignore[method-assign]
    stage.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return stage


def give_zero_gradients(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def counted(function: Callable[[], object]) -> int:
    """The host syncs of a call."""
    syncs.clear()
    function()
    return sum(syncs.values())


def ppo_stage(folders: SimpleNamespace, **options: Any) -> PPO:
    settings = ppo_stages.ppo_settings(lora=LORA, epochs=1, **options)
    settings = replace(settings, generation=replace(settings.generation, batch_size=12, cuda_graphs="never"))
    stage = on_device(ppo_stages.make_ppo(settings, folders, folders.sft.parent / "samples.jsonl", warm=False))
    stage.engine = make_engine(settings.generation, stage.tokenizer, stage.roles)  # type: ignore[attr-defined]
    stage.engine.stops = [-1]  # type: ignore[attr-defined]  # no response ends early
    return stage  # type: ignore[return-value]


def sampled(stage: PPO, tokens: int) -> int:
    """The syncs of sampling so many tokens for each prompt."""
    stage.roles.eval()
    generation = replace(stage.config.generation, max_new_tokens=tokens)
    stream = generator(0, "simulated", 0)
    return counted(
        lambda: rollout(
            stage.engine, stage.roles, "policy", stage.tokenizer, ppo_stages.PROMPTS[:12], generation, stream
        )
    )


def updated(stage: PPO) -> dict[str, Any]:
    """The micro-batches and syncs of a PPO step's update, and the syncs of all of it."""
    found: dict[str, Any] = {}
    update = stage.update

    def counting(experience: Any, minibatches: Any, step: int) -> Any:
        before = sum(syncs.values())
        result = update(experience, minibatches, step)
        found["syncs"] = sum(syncs.values()) - before
        found["microbatches"] = sum(len(minibatch) for minibatch in minibatches)
        return result

    stage.update = counting  # type: ignore[method-assign]
    found["step"] = counted(lambda: stage.training_step(ppo_stages.PROMPTS[:12], 0))
    found["places"] = syncs.most_common(30)
    return found


def supervised(stage: Stage, rows: Any) -> int:
    """The syncs of an optimiser step of SFT or of a reward model, and of a validation."""
    batch = stage.collate(stage.encode(rows))  # type: ignore[operator]

    def run() -> None:
        stage.training_step(batch, 0)
        with torch.no_grad():
            stage.on_validation_epoch_start()
            stage.validation_step(batch, 0)
            stage.on_validation_epoch_end()

    return counted(run)


def evaluated(stage: PPO) -> int:
    def run() -> None:
        stage.on_validation_epoch_start()
        stage.validation_step([SimpleNamespace(prompt=text) for text in ppo_stages.PROMPTS[:4]], 0)  # type: ignore[misc]
        stage.on_validation_epoch_end()

    with torch.no_grad():
        return counted(run)


def self_check() -> dict[str, Any]:
    """What the simulation is for: a mix raises, and a look at a value counts."""
    number = SimulatedTensor(torch.ones(3))
    try:
        number + torch.ones(3)
        mixed = "nothing raised"
    except MixedDevicesError as error:
        mixed = str(error)
    return {"mixed": mixed, "looks": counted(lambda: float(number.sum())), "none": counted(lambda: number + 1)}


def saved(folder: Path) -> SimpleNamespace:
    """A tiny SFT model and a reward adapter in `folder`."""
    tokenizer, roles = word_tokenizer(), tiny_roles()
    found = SimpleNamespace(sft=folder / "sft", reward=folder / "reward", tokenizer=tokenizer, policy={})
    save_model(tiny_model(), tokenizer, found.sft)
    save_adapter(roles, "reward", tiny_lora(), found.sft, None, found.reward)
    return found


def main(folder: Path) -> None:
    folders = saved(folder)
    simulate()
    evaluation.generator = lambda seed, purpose, step, device="cpu": generator(seed, purpose, step)
    few, many = ppo_stage(folders, microbatch_tokens=120), ppo_stage(folders, microbatch_tokens=40)
    sft, reward = (
        on_device(supervised_stages.sft_stage(folders, LORA)), on_device(supervised_stages.reward_stage(folders, LORA))
    )  # fmt: skip
    with SimulatedDevice():
        found = {
            "check": self_check(), "16 tokens": sampled(few, 16), "32 tokens": sampled(few, 32),
            "few": updated(few), "many": updated(many), "evaluation": evaluated(few),
            "sft": supervised(sft, supervised_stages.DEMONSTRATIONS),
            "reward": supervised(reward, supervised_stages.COMPARISONS),
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
