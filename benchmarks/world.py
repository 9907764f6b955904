"""Models of given shapes with random weights, and a PPO stage on them, assembled as in rlhf.pipeline.run."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import rlhf.sweep.resolvers  # noqa: F401  (Hydra composes with them)
from rlhf import root
from rlhf.models.assembly import lora_config, ppo_roles
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import load_tokenizer
from rlhf.models.roles import Role, Roles
from rlhf.pipeline.allocation import keep_freed_memory
from rlhf.pipeline.config import instantiate, settings_of
from rlhf.pipeline.quiet import quieten
from rlhf.scorers import Context
from rlhf.scorers.reward_model import RewardModelScorer
from rlhf.seeding import generator
from rlhf.settings import LoraSettings, Settings, is_quantized
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.ppo import PPO, make_ppo
from rlhf.tracking.metrics_file import JsonLines, read_metrics

PAD, EOS, UNK = 0, 1, 2
NEVER = -30.0  # a logit of EOS with which no response ends before its limit
CARRIER = 0.5  # value of the constant hidden unit in `_set_eos`
ATTENTION = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt_neox": ["query_key_value", "dense"]}


def llama(layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a `LlamaConfig`."""
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, **options,
    }  # fmt: skip


SHAPES = {
    "toy": llama(2, 64, 4, 128, 200),
    "3.7M": llama(4, 256, 4, 544, 2000),
    "16M": llama(6, 384, 6, 1024, 8000),
    "110M": llama(12, 768, 12, 2048, 16000),
    "smollm2_135m": llama(30, 576, 9, 1536, 49152, num_key_value_heads=3),
    "llama_7b": llama(32, 4096, 32, 11008, 32000),
    "gpt_neox_20b": {
        "model_type": "gpt_neox", "num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads": 64,
        "intermediate_size": 24576, "vocab_size": 50432, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "rotary_pct": 0.25,
    },
    "toy_neox": {
        "model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 200, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """A folder with a random "SFT model", a reward adapter on it and prompts, readable by any PPO implementation."""

    folder: Path

    @property
    def sft(self) -> Path:
        """Folder of the SFT model and its tokenizer, in the format of transformers."""
        return self.folder / "sft"

    @property
    def reward(self) -> Path:
        """Folder of the reward adapter in the format of PEFT: its update is zero, its head `score` is random."""
        return self.folder / "reward"

    @property
    def prompts(self) -> list[str]:
        """Prompts of words that are one token each."""
        return json.loads((self.folder / "prompts.json").read_text())


def make_world(
    folder: Path,
    shape: Mapping[str, Any],
    prompt_tokens: tuple[int, int],
    eos_logit: float = NEVER,
    rows: int = 256,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> World:
    """Write model, reward adapter and prompts into `folder`, unless they exist.

    Args:
        folder: of the world.
        shape: the model's configuration, a value of `SHAPES`.
        prompt_tokens: shortest and longest prompt.
        eos_logit: logit of EOS after any text.
        rows: number of prompts.
        device: where the weights are drawn.
        dtype: of the weights.
        seed: of weights and prompts.
    """
    world = World(folder)
    if (folder / "prompts.json").exists():
        return world
    tokenizer = word_tokenizer(shape["vocab_size"])
    torch.manual_seed(seed)
    with torch.device(device):
        config = AutoConfig.for_model(**shape, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prompts = random_prompts(rows, prompt_tokens, shape["vocab_size"], seed)
    _set_eos(model, tokenizer(prompts[:8])["input_ids"], eos_logit)
    return save_world(world, model, tokenizer, prompts)


def save_world(
    world: World, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> World:
    """Write a model, a new reward adapter on it and, as a sign of completeness last, the prompts."""
    save_model(model, tokenizer, world.sft)
    lora = lora_config(LoraSettings(r=8, alpha=64.0, target_modules=ATTENTION[model.config.model_type]))
    roles = Roles(model)
    roles.add_adapter("base", "reward", lora)
    roles.table["reward"] = Role("base", "reward")
    roles.add_head("reward", zero=False)
    save_adapter(roles, "reward", lora, world.sft, tokenizer, world.reward)
    (world.folder / "prompts.json").write_text(json.dumps(list(prompts)))
    return world


def random_prompts(rows: int, tokens: tuple[int, int], vocabulary: int, seed: int = 0) -> list[str]:
    """Prompts of random words, with lengths uniform from `tokens[0]` to `tokens[1]` inclusive."""
    stream = generator(seed, "benchmark prompts")
    lengths = torch.randint(tokens[0], tokens[1] + 1, (rows,), generator=stream).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(UNK + 1, vocabulary, (n,), generator=stream).tolist()) for n in lengths
    ]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word (w3 is token 3), so that prompts can have any exact length."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK} | {f"w{i}": i for i in range(UNK + 1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@torch.no_grad()
def _set_eos(model: PreTrainedModel, prompts: Sequence[Sequence[int]], logit: float) -> None:
    """Change the weights so that EOS has about this logit after any text: every program samples the same lengths.

    The first hidden unit carries a constant: all embeddings contain it, no layer writes to it, and only EOS's row of
    the output matrix reads it.
    """
    # 1. the constant goes in
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings.weight[:, 0] = CARRIER
    # 2. no layer adds to it
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj", "attention.dense", "dense_4h_to_h")):
            module.weight[0] = 0
            if module.bias is not None:
                module.bias[0] = 0
    # 3. its value behind the last norm, and the weight that turns it into the logit
    first: list[Tensor] = []
    for ids in prompts:
        row = torch.tensor([ids], device=model.device)
        first.append(model.base_model(input_ids=row).last_hidden_state[0, len(ids) // 2 :, 0].float())
    output.weight[:, 0] = 0
    output.weight[EOS] = 0
    output.weight[EOS, 0] = logit / torch.cat(first).mean()


def composed(overrides: Sequence[str]) -> tuple[DictConfig, Settings]:
    """The configuration that `rlhf` composes from these overrides, and its typed settings."""
    with initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
        config = compose("config", list(overrides))
    return config, settings_of(config)


def make_stage(world: World, overrides: Sequence[str], folder: Path, device: str = "cpu", reward: bool = True) -> PPO:
    """A PPO stage of the configuration that `rlhf` composes; with `reward=False` every score is 0."""
    fixed = [
        "model=custom", f"model.name_or_path={world.sft}", "ppo.eval_every=1000000", "ppo.schedule=constant",
        "ppo.warmup_steps=0", "ppo.missing_eos_penalty=0", "ppo.reference_every=1000000",
    ]  # fmt: skip
    config, settings = composed([*fixed, *overrides])
    quieten()
    lightning.seed_everything(settings.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    tokenizer = load_tokenizer(settings.model)
    quantization = settings.quantization if is_quantized(settings.quantization) else None
    roles = ppo_roles(settings, tokenizer, world.sft, world.reward if reward else None, quantization).to(device)
    context = Context(None, tokenizer, roles, 0.0, settings.ppo.microbatch_tokens)  # type: ignore[arg-type]
    scorer = RewardModelScorer(context)
    if not reward:
        scorer = lambda rollouts: torch.zeros(len(rollouts.prompts), device=device)  # noqa: E731
    samples = folder / "samples.jsonl"
    return make_ppo(settings, roles, tokenizer, scorer, instantiate(config.kl, "kl"), lambda *_: ({}, []), samples)


class Clock(lightning.Callback):
    """Measures wall and processor time of each step after the first, which is a warm-up.

    Peak GPU memory is reset at the end of the warm-up. `pause` is called between steps and is not measured.
    """

    def __init__(self, pause: Callable[[], None]) -> None:
        self.pause, self.started = pause, (0.0, 0.0)
        self.laps: list[tuple[float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Record the step that ends, and start the clock for the next."""
        wall, cpu = time.perf_counter(), time.process_time()
        if self.started[0]:
            self.laps.append((wall - self.started[0], cpu - self.started[1]))
        elif torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.pause()
        self.started = time.perf_counter(), time.process_time()


def train(
    stage: PPO,
    prompts: Sequence[str],
    folder: Path,
    seconds: float | None = None,
    pause: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Train to the last step, or for `seconds`.

    Returns:
        The metrics of each step after the warm-up, with its wall time as `seconds` and its processor time as `cpu`.

    Raises:
        RuntimeError: the time was up before a second step.
    """
    clock, settings = Clock(pause), stage.ppo
    trainer = lightning.Trainer(
        accelerator="gpu" if stage.roles.device.type == "cuda" else "cpu", devices=1, max_epochs=1, callbacks=[clock],
        logger=[JsonLines(folder)], enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        inference_mode=False, log_every_n_steps=1, max_time=None if seconds is None else timedelta(seconds=seconds),
    )  # fmt: skip
    batches = SeededBatches(len(prompts), settings.rollout_batch_size, stage.config.seed, settings.steps)
    trainer.fit(stage, loader(prompts, list, batches))
    metrics = read_metrics(folder)
    if not clock.laps:  # better a warm-up than nothing
        timed = sum(value for key, value in metrics[0].items() if key.startswith("time/"))
        return [{**metrics[0], "seconds": timed, "cpu": 0.0, "warm_up": 1.0}]
    lines = zip(metrics[1:], clock.laps, strict=False)
    return [{**line, "seconds": wall, "cpu": cpu} for line, (wall, cpu) in lines]
