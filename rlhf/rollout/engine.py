"""The rollout batch and the engines that sample it.

Sampling is plain: softmax of the logits over the temperature, no top-k, top-p or minimum length, whatever the
generation_config of a checkpoint asks for, because log-probs of another distribution than the sampled one would bias
every divergence. A response ends at any of the ids that the model stops at (`stop_ids`), each of them an EOS here. An
EOS counts as a response token when it was sampled, and is never appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.roles import Roles


@dataclass
class Generated:
    """Sampled ids [batch, time] after the prompts, each row valid up to its length (EOS included).

    `logprobs` of the ids, and `values` of the states they were chosen in where the value head is on the same trunk.
    """

    ids: Int[Tensor, "batch time"]
    lengths: Int[Tensor, "batch"]
    logprobs: Float[Tensor, "batch time"] | None
    values: Float[Tensor, "batch time"] | None = None


@runtime_checkable
class Engine(Protocol):
    """Samples continuations of `prompts` (lists of ids) from a role's distribution.

    `temperature` 0 is greedy. Rows end at EOS (kept) or at `max_new_tokens`. The same generator state gives the same
    ids. `logprobs` are under the sampling temperature (float32, nats).
    """

    def generate(
        self,
        roles: Roles,
        role: str,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Generated:
        """Sampled continuations, in the order of the prompts."""
        ...


def as_list(ids: int | Sequence[int]) -> list[int]:
    """One id, or several, as a list."""
    return [ids] if isinstance(ids, int) else list(ids)
