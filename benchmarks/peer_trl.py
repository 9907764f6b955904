"""TRL's side of `peer.py`, run in TRL's own environment: prints a JSON line per PPO step after the warm-up.

`trl.experimental.ppo` has one long `train`, so its phases are timed at the functions that it calls. Generation is
`batch_generation`; the update starts at the first `accumulate`; the rest of a step, including housekeeping, counts as
`score`. The process blocks after each step until it reads a line from standard input.
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
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

IMPORTED = peak_rss()


class Phases(TrainerCallback):
    """Measures wall seconds of the phases of each step after the first, and its processor seconds."""

    def __init__(self, eos: int) -> None:
        self.eos, self.tokens = eos, 0.0
        self.last, self.cpu, self.generate, self.updating, self.steps = 0.0, 0.0, 0.0, 0.0, 0
        self.rows: list[dict[str, float]] = []

    def timed_generation(self, real: Callable) -> Callable:
        """`real`, TRL's generation of a rollout batch, with its time and the mean response length recorded."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.updating, started = 0.0, time.perf_counter()
            result = real(*args, **kwargs)
            self.generate = time.perf_counter() - started
            self.tokens = mean_length(result[0][:, args[1].shape[1] :], self.eos)
            return result

        return call

    def timed_update(self, real: Callable) -> Callable:
        """`real`, called for every minibatch, with the time of the first call in a step recorded."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.updating = self.updating or time.perf_counter()
            return real(*args, **kwargs)

        return call

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Record the phases of the step that ends, and wait for the turn of the next."""
        now, cpu = time.perf_counter(), time.process_time()
        if self.steps:
            row = {"generate": self.generate, "score": self.updating - self.last - self.generate}
            row |= {"update": now - self.updating, "seconds": now - self.last, "cpu": cpu - self.cpu}
            self.rows.append({**row, "tokens": self.tokens})
        turn()
        self.last, self.cpu, self.steps = time.perf_counter(), time.process_time(), self.steps + 1


def mean_length(responses: Tensor, eos: int) -> float:
    """Mean number of tokens up to and including the first EOS, of `responses` (rows × tokens)."""
    ended = responses == eos
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, responses.shape[1])
    return float(lengths.float().mean())


def reward_model(world: Path, head: Path) -> PreTrainedModel:
    """The SFT model as a sequence classifier, with the head of our reward adapter if `head` exists.

    The adapter's own update is zero, so both sides give the same scores.
    """
    model = AutoModelForSequenceClassification.from_pretrained(world / "sft", num_labels=1)
    if head.exists():
        model.score.weight.data.copy_(load_file(head)["base_model.model.score.weight"])
    return model


def ppo_config(options: argparse.Namespace, folder: str) -> PPOConfig:
    """TRL's configuration for the same algorithm and batches as ours."""
    return PPOConfig(
        output_dir=folder,
        # without gradient accumulation, which would let several of TRL's minibatches share one optimiser step
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
        bf16=options.dtype == "bfloat16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def make_trainer(config: PPOConfig, world: Path, tokenizer: PreTrainedTokenizerBase, phases: Phases) -> PPOTrainer:
    """TRL's trainer on the models and prompts of `world`, with `phases` measuring it."""
    prompts = json.loads((world / "prompts.json").read_text())
    data = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
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
    trainer.accelerator.accumulate = phases.timed_update(trainer.accelerator.accumulate)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    for name in ("steps", "rollouts", "minibatch", "epochs", "tokens"):
        parser.add_argument(name, type=int)
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--lr", type=float, default=1e-5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.world / "sft", padding_side="left")
    phases = Phases(tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(ppo_config(options, folder), options.world, tokenizer, phases)
        trainer.train()
    for row, line in zip(phases.rows, trainer.state.log_history[1:], strict=False):
        emit("step", **row, reward=float(line["objective/scores"]))
    emit("memory", peak=peak_rss(), imported=IMPORTED)


if __name__ == "__main__":
    main()
