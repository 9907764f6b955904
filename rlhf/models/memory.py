"""How much memory a PPO run will need, from its configuration alone: no weight is made."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.models.heads import CHUNK_ELEMENTS
from rlhf.models.loading import DTYPES, LINEAR, skeleton
from rlhf.settings import LoraSettings, Settings

PROGRAM = 700 * 2**20  # what the process itself takes on a CPU: torch, transformers, lightning (measured)
AUTOMATIC = 0.8  # of the free memory that an automatic budget may take: the estimate is right within a fifth
TRAINED = 4 + 4 + 8  # a trained parameter in float32: itself, its gradient, AdamW's two moments


@dataclass(frozen=True)
class Memory:
    """Bytes. `generating` and `updating` come one after the other; the rest stays."""

    program: int
    weights: int
    trained: int
    generating: int
    updating: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.program + self.weights + self.trained + max(self.generating, self.updating)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "what trains": self.trained, "generating": self.generating,
                 "updating": self.updating}  # fmt: skip
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
        return f"about {self.peak / 2**30:.1f} GiB ({listed})"


def estimate(settings: Settings, vocabulary: int | None, reward_model: bool, shares: int = 1) -> Memory | None:
    """The memory of a PPO run; None where the model's configuration cannot be read.

    Counts the frozen base in its dtype, what trains in float32 with AdamW's moments, the key/value cache and the
    merged matrices while generating, and while updating the activations that a backward pass through policy and value
    needs for `ppo.microbatch_tokens` tokens. Of `shares` processes that hold the base together it is the memory of one.
    """
    model = skeleton(settings.model, vocabulary)
    if model is None:
        return None
    config, size = model.config.get_text_config(), torch.finfo(DTYPES[settings.model.dtype]).bits // 8
    layers, hidden = _largest(config, "num_hidden_layers"), _largest(config, "hidden_size")
    heads = _largest(config, "num_attention_heads")
    head = _largest(config, "head_dim") or (hidden // heads if heads else 0)
    keys = head * (_largest(config, "num_key_value_heads") or heads)  # 0 of a state space, which has no such cache
    inner = _largest(config, "intermediate_size") or 4 * hidden
    parameters = sum(p.numel() for p in model.parameters())
    linear = _linear_elements(model)
    stored = settings.quantization or {}
    width = 1.0 if stored.get("load_in_8bit") else 0.56 if stored.get("load_in_4bit") else float(size)
    weights = int((parameters - linear) * size + linear * width / shares)

    full = settings.lora.r == 0
    value = settings.ppo.value_model
    value_lora = settings.reward.lora if reward_model and settings.reward.lora.r else settings.lora
    trained = parameters * TRAINED if full else _adapter(model, settings.lora) * TRAINED
    if value != "trunk_head":
        trained += parameters * TRAINED if full or value == "full" else _adapter(model, value_lora) * TRAINED
    weights += 4 * _adapter(model, settings.reward.lora) if reward_model else 0

    text = _text(settings)
    rows = min(settings.generation.batch_size, settings.ppo.rollout_batch_size)
    merged = 0 if full or width != size or shares > 1 else _adapted(model, settings.lora) * size
    generating = 2 * rows * text * layers * keys * size + merged
    tokens = max(settings.ppo.microbatch_tokens, text)
    # what autograd keeps of a layer: residuals, norms, queries, keys and values before and after rotation, attention's
    # output, the MLP's two inner products, their activation and its gate
    layer = (12 * hidden + 4 * keys + 4 * inner) * size
    kept = tokens * (layers * hidden * size + layer if settings.model.gradient_checkpointing else layers * layer)
    passes = 1 if value == "trunk_head" else 2
    logits = 3 * 4 * min(CHUNK_ELEMENTS, tokens * config.vocab_size)
    program = 0 if torch.cuda.is_available() else PROGRAM
    if settings.generation.engine == "vllm":
        generating, program = 0, program + _served(settings)
    return Memory(program, weights, trained, generating, passes * kept + logits)


def _largest(config: PreTrainedConfig, name: str) -> int:
    """A number of the configuration, the largest where each layer has its own; 0 without any."""
    found = getattr(config, name, None) or 0
    return max(found) if isinstance(found, list | tuple) else int(found)


def largest_budget(
    settings: Settings, vocabulary: int | None, reward_model: bool, free: int, shares: int = 1
) -> int | None:
    """The `ppo.microbatch_tokens` whose estimate takes at most `AUTOMATIC` of `free` bytes; None as `estimate`.

    A power of two, from the one that holds a text, which is taken even where it does not fit, to the one that holds a
    minibatch, above which nothing changes.
    """
    smallest, most = _text(settings), _text(settings) * settings.ppo.minibatch_size
    chosen = None
    for power in range((smallest - 1).bit_length(), (most - 1).bit_length() + 1):
        tried = replace(settings, ppo=replace(settings.ppo, microbatch_tokens=2**power))
        needed = estimate(tried, vocabulary, reward_model, shares)
        if needed is None or (chosen is not None and needed.peak > AUTOMATIC * free):
            break
        chosen = 2**power
    return chosen


def _text(settings: Settings) -> int:
    """Tokens of the longest prompt with the longest response."""
    return settings.model.max_prompt_tokens + settings.generation.max_new_tokens


def available() -> int:
    """Free memory in bytes: of the GPU where there is one, else what the system says could be had."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _served(settings: Settings) -> int:
    """What vLLM keeps of a GPU, from its start to the end."""
    everything = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    return int(everything * settings.generation.vllm["gpu_memory_utilization"])


def _linear_elements(model: PreTrainedModel) -> int:
    """Weights that quantisation stores in fewer bits: all linear layers but the language-model head."""
    output = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, LINEAR) and m is not output]
    return sum(layer.weight.numel() for layer in layers)


def _adapter(model: PreTrainedModel, lora: LoraSettings) -> int:
    """Parameters of a LoRA."""
    shapes = [layer.weight.shape for layer in _targets(model, lora)]
    return sum(lora.r * (rows + columns) for rows, columns in shapes)


def _adapted(model: PreTrainedModel, lora: LoraSettings) -> int:
    """Weights of the matrices that a LoRA is on."""
    return sum(layer.weight.numel() for layer in _targets(model, lora))


def _targets(model: PreTrainedModel, lora: LoraSettings) -> list[Any]:
    names = set(lora.target_modules)
    return [m for name, m in model.named_modules() if isinstance(m, LINEAR) and name.rpartition(".")[2] in names]
