"""Estimate the memory of a PPO run from its configuration, without creating weights."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.models.heads import chunk_elements
from rlhf.models.loading import DTYPES, LINEAR, skeleton
from rlhf.settings import LoraSettings, Settings

PROGRAM = 700 * 2**20  # bytes of the process itself on a CPU: torch, transformers, lightning (measured)
AUTOMATIC = 0.8  # share of the free memory that an automatic budget may use: the estimate is right within a fifth
TRAINED = 4 + 4 + 8  # bytes per trained parameter, in float32: itself, its gradient, AdamW's two moments


@dataclass(frozen=True)
class Memory:
    """Memory in bytes. `generating` and `updating` alternate; the rest is always held."""

    program: int
    weights: int
    trained: int
    generating: int
    updating: int

    @property
    def peak(self) -> int:
        """The most memory held at once, in bytes."""
        return self.program + self.weights + self.trained + max(self.generating, self.updating)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "training state": self.trained, "generating": self.generating,
                 "updating": self.updating}  # fmt: skip
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"about {self.peak / 2**30:.1f} GiB ({listed})"


def estimate(settings: Settings, vocabulary: int | None, reward_model: bool, shares: int = 1) -> Memory | None:
    """Estimate the memory of one process of a PPO run; None if the model's configuration cannot be read.

    Counts the frozen base in its dtype, trained parameters in float32 with AdamW's moments, the key/value cache and the
    merged matrices while generating, and the activations of `ppo.microbatch_tokens` tokens while updating.

    `vocabulary` is the number of tokens of a model that is created from a config. `shares` is the number of processes
    that the base is sharded over.
    """
    model = skeleton(settings.model, vocabulary)
    if model is None:
        return None
    shape = _Shape.of(model.config.get_text_config(), torch.finfo(DTYPES[settings.model.dtype]).bits // 8)
    generating = _generating(settings, model, shape, shares)
    program = 0 if torch.cuda.is_available() else PROGRAM
    if settings.generation.engine == "vllm":
        generating, program = 0, program + _vllm_share(settings)
    return Memory(
        program=program,
        weights=_frozen_weights(settings, model, shape, reward_model, shares),
        trained=_trained(settings, model, reward_model),
        generating=generating,
        updating=_updating(settings, shape),
    )


@dataclass(frozen=True)
class _Shape:
    """The sizes of a model that activations depend on; where blocks differ, those of the largest.

    `keys` is the width of the keys of all heads together, 0 for a state space, which has no key/value cache. `inner` is
    the width of the MLP. `size` is the number of bytes of a weight before quantisation.
    """

    layers: int
    hidden: int
    keys: int
    inner: int
    vocabulary: int
    size: int

    @classmethod
    def of(cls, config: PreTrainedConfig, size: int) -> "_Shape":
        """Read off a configuration of transformers, whose keys differ between architectures."""
        hidden, heads = _largest(config, "hidden_size"), _largest(config, "num_attention_heads")
        head = _largest(config, "head_dim") or (hidden // heads if heads else 0)
        keys = head * (_largest(config, "num_key_value_heads") or heads)
        inner = _largest(config, "intermediate_size") or 4 * hidden
        return cls(_largest(config, "num_hidden_layers"), hidden, keys, inner, config.vocab_size, size)


def _largest(config: PreTrainedConfig, name: str) -> int:
    """A number of the configuration, the largest if there is one per block; 0 if it is missing."""
    found = getattr(config, name, None) or 0
    return max(found) if isinstance(found, list | tuple) else int(found)


def _bytes_per_linear_weight(settings: Settings, shape: _Shape) -> float:
    options = settings.quantization or {}
    # 4-bit: half a byte, and the scales of the blocks.
    return 1.0 if options.get("load_in_8bit") else 0.56 if options.get("load_in_4bit") else float(shape.size)


def _frozen_weights(settings: Settings, model: PreTrainedModel, shape: _Shape, reward_model: bool, shares: int) -> int:
    """The base, with linear layers quantised or sharded, and the reward model's adapter in float32."""
    parameters, linear = sum(p.numel() for p in model.parameters()), _linear_weights(model)
    base = int((parameters - linear) * shape.size + linear * _bytes_per_linear_weight(settings, shape) / shares)
    return base + (4 * _adapter_parameters(model, settings.reward.lora) if reward_model else 0)


def _trained(settings: Settings, model: PreTrainedModel, reward_model: bool) -> int:
    """Trained parameters of policy and value function in float32, their gradients and AdamW's moments."""
    parameters, full = sum(p.numel() for p in model.parameters()), settings.lora.r == 0
    trained = parameters if full else _adapter_parameters(model, settings.lora)
    if settings.ppo.value_model != "trunk_head":
        lora = settings.reward.lora if reward_model and settings.reward.lora.r else settings.lora
        whole = full or settings.ppo.value_model == "full"
        trained += parameters if whole else _adapter_parameters(model, lora)
    return trained * TRAINED


def _generating(settings: Settings, model: PreTrainedModel, shape: _Shape, shares: int) -> int:
    """The key/value cache, and the copies of matrices with the adapter merged in."""
    rows = min(settings.generation.batch_size, settings.ppo.rollout_batch_size)
    cache = 2 * rows * _longest_text(settings) * shape.layers * shape.keys * shape.size
    stays_separate = _bytes_per_linear_weight(settings, shape) != shape.size or shares > 1  # see `Roles.merged`
    if settings.lora.r == 0 or stays_separate:
        return cache
    return cache + sum(layer.weight.numel() for layer in _adapted_layers(model, settings.lora)) * shape.size


def _updating(settings: Settings, shape: _Shape) -> int:
    """Activations for the backward passes through policy and value function, and the logits of a chunk of tokens."""
    tokens = max(settings.ppo.microbatch_tokens, _longest_text(settings))
    # Autograd keeps, per block: residuals, norms, queries, keys and values before and after rotation, the output of
    # attention, the MLP's two inner products, their activation and its gate.
    block = (12 * shape.hidden + 4 * shape.keys + 4 * shape.inner) * shape.size
    # With checkpointing: the input of every block, and all of one block while it is recomputed.
    checkpointed = shape.layers * shape.hidden * shape.size + block
    kept = tokens * (checkpointed if settings.model.gradient_checkpointing else shape.layers * block)
    passes = 1 if settings.ppo.value_model == "trunk_head" else 2
    held = chunk_elements("cuda" if torch.cuda.is_available() else "cpu")
    logits = 3 * 4 * min(held, tokens * shape.vocabulary)  # float32, three copies
    return passes * kept + logits


def largest_budget(
    settings: Settings, vocabulary: int | None, reward_model: bool, free: int, shares: int = 1
) -> int | None:
    """The largest `ppo.microbatch_tokens` whose estimate is at most `AUTOMATIC` of `free` bytes.

    A power of two, at least large enough for the longest text, even if that does not fit, and at most large enough for
    a minibatch. None if the model's configuration cannot be read; other arguments as in `estimate`.
    """
    smallest, most = _longest_text(settings), _longest_text(settings) * settings.ppo.minibatch_size
    chosen = None
    for power in range((smallest - 1).bit_length(), (most - 1).bit_length() + 1):
        tried = replace(settings, ppo=replace(settings.ppo, microbatch_tokens=2**power))
        needed = estimate(tried, vocabulary, reward_model, shares)
        if needed is None or (chosen is not None and needed.peak > AUTOMATIC * free):
            break
        chosen = 2**power
    return chosen


def _longest_text(settings: Settings) -> int:
    """Tokens of the longest prompt and the longest response together."""
    return settings.model.max_prompt_tokens + settings.generation.max_new_tokens


def available() -> int:
    """Free memory in bytes: of the GPU if there is one, else of the machine (`MemAvailable`)."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _vllm_share(settings: Settings) -> int:
    """The part of the GPU's memory that vLLM reserves for the whole run, in bytes."""
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    return int(total * settings.generation.vllm["gpu_memory_utilization"])


def _linear_weights(model: PreTrainedModel) -> int:
    """Number of weights that quantisation applies to: of all linear layers except the language-model head."""
    output = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, LINEAR) and m is not output]
    return sum(layer.weight.numel() for layer in layers)


def _adapter_parameters(model: PreTrainedModel, lora: LoraSettings) -> int:
    """Number of parameters of a LoRA."""
    shapes = [layer.weight.shape for layer in _adapted_layers(model, lora)]
    return sum(lora.r * (rows + columns) for rows, columns in shapes)


def _adapted_layers(model: PreTrainedModel, lora: LoraSettings) -> list[Any]:
    names = set(lora.target_modules)
    return [m for name, m in model.named_modules() if isinstance(m, LINEAR) and name.rpartition(".")[2] in names]
