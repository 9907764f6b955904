"""The engine that `generation.engine` names, and whether PPO may use the log-probs it captures."""

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.models.roles import Roles
from rlhf.models.tokens import stop_ids
from rlhf.rollout.engine import Engine
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine
from rlhf.settings import GenerationSettings


def make_engine(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, roles: Roles) -> Engine:
    """The configured engine.

    It captures log-probs while sampling unless `generation.capture_logprobs=never`; see `use_captured_logprobs`.
    """
    if settings.engine == "vllm":
        from rlhf.rollout.vllm import VllmEngine  # vLLM is an optional dependency

        return VllmEngine(settings, tokenizer, roles)
    stops = stop_ids(tokenizer, roles.trunk("reference"))
    if settings.engine == "transformers":
        return TransformersEngine(stops, tokenizer.pad_token_id)
    capture = settings.capture_logprobs != "never"
    return NativeEngine(stops, capture, fixed=settings.cuda_graphs == "auto" and can_be_recorded(roles))


def can_be_recorded(roles: Roles) -> bool:
    """Whether steps of these models can run as CUDA graphs: on a GPU, and not on an int8 base.

    bitsandbytes waits for the GPU in each product with int8 weights, to look for outliers. That breaks the recording.
    """
    int8 = any(parameter.dtype == torch.int8 for parameter in roles.parameters())
    return roles.device.type == "cuda" and not roles.sharded and not int8


def use_captured_logprobs(settings: GenerationSettings, roles: Roles) -> bool:
    """Whether PPO takes the log-probs captured while sampling as its old log-probs.

    With `generation.capture_logprobs=auto`: only where they are exact, which is the native engine in float32, on a GPU
    with full products ("highest", not TF32). Elsewhere a row has other log-probs in another batch shape or kernel. They
    are then computed again in the shapes of the update, and the captured ones only serve to measure the gap.
    """
    exact = settings.engine == "native" and roles.in_float32
    return exact if settings.capture_logprobs == "auto" else settings.capture_logprobs == "always"
