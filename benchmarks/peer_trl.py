"""TRL's side of `peer.py`, run by TRL's own environment: a JSON line per PPO step after the warm-up.

`trl.experimental.ppo` has one long `train`: its phases are timed at the functions it calls. Generation is
`batch_generation`; updates begin at the first `accumulate`; the rest of a step, housekeeping too, counts as `score`.
After each step it stands still until a line comes from standard input.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import emit, peak_rss, turn
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

IMPORTED = peak_rss()


class Phases(TrainerCallback):
    """Wall seconds of the phases of a step, from the end of the step before to its own."""

    def __init__(self, eos: int) -> None:
        self.eos, self.tokens = eos, 0.0
        self.last, self.cpu, self.generate, self.updating, self.steps = 0.0, 0.0, 0.0, 0.0, 0
        self.rows: list[dict[str, float]] = []

    def timed_generation(self, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.updating, started = 0.0, time.perf_counter()
            result = real(*args, **kwargs)
            self.generate = time.perf_counter() - started
            self.tokens = mean_length(result[0][:, args[1].shape[1] :], self.eos)
            return result

        return call

    def noting_update(self, real: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.updating = self.updating or time.perf_counter()
            return real(*args, **kwargs)

        return call

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        if self.steps:
            row = {"generate": self.generate, "score": self.updating - self.last - self.generate}
            row |= {"update": now - self.updating, "seconds": now - self.last, "cpu": cpu - self.cpu}
            self.rows.append({**row, "tokens": self.tokens})
        turn()
        self.last, self.cpu, self.steps = time.perf_counter(), time.process_time(), self.steps + 1


def mean_length(responses: Tensor, eos: int) -> float:
    """Tokens up to the first EOS and with it, on average."""
    ended = responses == eos
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, responses.shape[1])
    return float(lengths.float().mean())


def reward_model(world: Path, head: Path) -> PreTrainedModel:
    """The trunk as a sequence classifier with the head of our reward adapter (the adapter itself adds nothing)."""
    model = AutoModelForSequenceClassification.from_pretrained(world / "sft", num_labels=1)
    if head.exists():
        model.score.weight.data.copy_(load_file(head)["base_model.model.score.weight"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    for name in ("steps", "rollouts", "minibatch", "epochs", "tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("--lr", type=float, default=1e-5)
    options = parser.parse_args()
    world: Path = options.world
    tokenizer = AutoTokenizer.from_pretrained(world / "sft", padding_side="left")
    prompts = json.loads((world / "prompts.json").read_text())
    data = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    phases = Phases(tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            # one step per minibatch: with accumulation, minibatches of TRL would share a step
            per_device_train_batch_size=options.rollouts,
            gradient_accumulation_steps=1,
            num_mini_batches=options.rollouts // options.minibatch,
            local_rollout_forward_batch_size=options.rollouts,
            num_ppo_epochs=options.epochs,
            total_episodes=options.rollouts * (options.steps + 1),
            response_length=options.tokens,
            temperature=1.0,
            stop_token="eos",
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            gamma=1.0,
            lam=0.95,
            num_sample_generations=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(world / "sft"),
            ref_model=None,
            reward_model=reward_model(world, world / "reward" / "adapter_model.safetensors"),
            value_model=reward_model(world, world / "none"),
            train_dataset=data,
            eval_dataset=data,
            peft_config=LoraConfig(
                r=8, lora_alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
            ),
            callbacks=[phases],
        )
        ppo_trainer.batch_generation = phases.timed_generation(ppo_trainer.batch_generation)
        trainer.accelerator.accumulate = phases.noting_update(trainer.accelerator.accumulate)
        trainer.train()
    for row, line in zip(phases.rows, trainer.state.log_history[1:], strict=False):
        emit("step", **row, reward=float(line["objective/scores"]))
    emit("memory", peak=peak_rss(), imported=IMPORTED)


if __name__ == "__main__":
    main()
