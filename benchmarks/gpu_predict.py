"""Seconds and bytes that a PPO step should take, from the model's shape and two measured rates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from rlhf.models import memory
from rlhf.models.sizes import Sizes
from rlhf.settings import Settings

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """What a step computes: weights in products, and tokens.

    Attributes:
        blocks: weights of the linear layers of all blocks.
        head: weights of the language-model head.
        held: bytes of these weights as they are read while decoding.
        cache: bytes of keys and values per token.
        rows: rollouts.
        prompts: tokens of all prompts.
        responses: tokens of all responses.
    """

    blocks: int
    head: int
    held: int
    cache: int
    rows: int
    prompts: int
    responses: int

    @classmethod
    def of(cls, model: PreTrainedModel, settings: Settings, prompts: Sequence[int], held: int) -> "Work":
        """Read off a model; `prompts` are the lengths of a rollout batch's prompts, and no response ends early."""
        config, output = model.config.get_text_config(), model.get_output_embeddings()
        linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
        blocks = sum(m.in_features * m.out_features for m in linear if m is not output)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * heads * width * DTYPE_BYTES[settings.model.dtype]
        rows, limit = len(prompts), settings.generation.max_new_tokens
        return cls(blocks, output.in_features * output.out_features, held, cache, rows, sum(prompts), rows * limit)


def predicted_seconds(work: Work, settings: Settings, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of generating, scoring and updating at the measured FLOP/s and bytes/s.

    Products alone count, and for decoding the weights and the cache that each step reads; attention, norms, LoRA,
    padding and launches are left out, so that a prediction is a floor.
    """
    flops, bandwidth, tokens = rates["flops"], rates["bandwidth"], work.prompts + work.responses
    blocks, head = 2 * work.blocks * tokens / flops, 2 * work.head * work.responses / flops
    # 1. Decoding: bound by memory or by products, whichever takes longer.
    batches = -(-work.rows // settings.generation.batch_size)
    limit = settings.generation.max_new_tokens
    read = batches * limit * work.held + limit * work.cache * (work.prompts + work.responses / 2)
    decode = max(read / bandwidth, 2 * (work.blocks + work.head) * work.responses / flops)
    # 2. Frozen passes: reward, value, old log-probs, reference; with dropout policy and value again, under its masks.
    dropout = settings.lora.dropout > 0
    passes = 4 + (1 if dropout else 0)
    heads = 2 if settings.divergence.input != "none" else 1
    # 3. Updates of policy and value: forward, and backward to the inputs; recomputed with checkpointing.
    per_epoch = 2 * (2 + settings.model.gradient_checkpointing) * blocks + 2 * head
    return {
        "generate": 2 * work.blocks * work.prompts / flops + decode,
        "score": passes * blocks + heads * head,
        "update": settings.ppo.epochs * per_epoch,
    }


def predicted_gib(settings: Settings, vocabulary: int, on_gpu: bool) -> dict[str, float]:
    """The estimate of `rlhf.models.memory` for the tensors of each phase, in GiB; {} where it cannot be made."""
    sizes = Sizes.of(settings.model, vocabulary)
    if sizes is None:
        return {}
    needed = memory.stage_memory("ppo", settings, sizes, memory.Work(on_gpu=on_gpu))
    held = needed.weights + needed.trained
    phases = {"generate": "generating", "score": "scoring", "update": "updating"}
    tensors = {name: held + needed.phases[phase] / memory.GAPS for name, phase in phases.items()}
    return {name: size / 2**30 for name, size in {"loading": needed.weights, **tensors}.items()}
