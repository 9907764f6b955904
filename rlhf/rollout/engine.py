"""What a sampling engine receives, returns and guarantees; the rules of sampling.

The sampling distribution is the softmax of the logits divided by the temperature. There is no top-k, top-p or minimum
length, whatever the generation_config of a checkpoint asks for: log-probs of a distribution other than the sampled one
would bias every divergence.

A response ends at any of the token ids at which the model stops (`rlhf.models.tokens.stop_ids`); each of them counts as
EOS here. A sampled EOS is part of the response. An EOS that was not sampled is never appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.roles import Roles


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts to continue, and how.

    `prompts` are lists of token ids. Temperature 0 decodes greedily. All randomness comes from `generator`: the same
    state gives the same ids.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    temperature: float
    generator: torch.Generator


@dataclass
class Generated:
    """Sampled token ids, without the prompts; each row is valid up to its length, which includes the EOS.

    `logprobs` are those of the sampled ids at the sampling temperature, in float32 and nats; None if the engine does
    not compute them. `values` are those of the states in which the ids were chosen; None unless the value head shares
    the trunk and adapter of the sampled role.
    """

    ids: Int[Tensor, "batch time"]
    lengths: Int[Tensor, "batch"]
    logprobs: Float[Tensor, "batch time"] | None
    values: Float[Tensor, "batch time"] | None = None


@runtime_checkable
class Engine(Protocol):
    """Samples continuations of prompts from the distribution of a role (see the module's docstring)."""

    def generate(self, roles: Roles, role: str, request: GenerationRequest) -> Generated:
        """Sample one continuation per prompt, in the order of the prompts, each up to EOS or `max_new_tokens`."""
        ...


def id_list(ids: int | Sequence[int]) -> list[int]:
    """One or several token ids as a list."""
    return [ids] if isinstance(ids, int) else list(ids)
