"""What is computed from hidden states: scalars, log-probabilities and divergences, without holding all logits."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24  # float32 logits held at once (64 MiB): 524 tokens at a vocabulary of 32,000
GPU_FACTOR = 4  # times as many on a GPU, where a chunk costs some twenty kernels whatever its size


class ScalarHead(nn.Linear):
    """Maps hidden states to scalars (values or rewards), in float32.

    Weight [1, hidden], and no bias unless asked for, as the `score` layer of transformers' sequence classifiers. A bias
    starts at 0.
    """

    def __init__(self, hidden: int, zero: bool, bias: bool = False):
        super().__init__(hidden, 1, bias=bias)
        if bias:
            nn.init.zeros_(self.bias)
        # 1/√(d+1) gives initial rewards of unit size (Stiennon et al. 2020). A value head starts at value 0.
        nn.init.zeros_(self.weight) if zero else nn.init.normal_(self.weight, std=(hidden + 1) ** -0.5)

    def forward(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape"]:
        """One float32 number per hidden state, also under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)


class TokenStats(NamedTuple):
    """Per token, in float32 and nats: log-probability of the target and, on request, entropy of the distribution."""

    logprobs: Float[Tensor, "tokens"]
    entropy: Float[Tensor, "tokens"] | None = None


def chunk_elements(on_gpu: bool) -> int:
    """The number of float32 logits held at once."""
    return CHUNK_ELEMENTS * (GPU_FACTOR if on_gpu else 1)


def chunk_size(output: nn.Module) -> int:
    """The number of tokens whose logits may be held at once."""
    assert isinstance(output.weight, Tensor)
    return max(chunk_elements(output.weight.device.type == "cuda") // output.weight.shape[0], 1)


def token_stats(
    hidden: Float[Tensor, "tokens hidden"],
    output: nn.Module,
    targets: Int[Tensor, "tokens"],
    temperature: float = 1.0,
    entropy: bool = False,
    entropy_grad: bool = False,
) -> TokenStats:
    """Log-probability of each target under softmax(output(hidden) / temperature), and optionally the entropy.

    Float32 logits are held for one chunk of tokens at a time. With autograd, each chunk is recomputed in the backward
    pass. The entropy has no gradient unless `entropy_grad` asks for it.
    """

    def stats(h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        logprobs = (output(h).float() / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, y[:, None]).squeeze(-1)
        if not entropy:
            return (chosen,)
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            return chosen, -(logprobs.exp() * logprobs).sum(-1)

    return TokenStats(*_in_chunks(stats, chunk_size(output), hidden, targets))


def most_likely(hidden: Float[Tensor, "tokens hidden"], output: nn.Module) -> Int[Tensor, "tokens"]:
    """The id of the most likely token after each hidden state; no gradient. Works in chunks, as `token_stats` does."""
    with torch.no_grad():
        return _in_chunks(lambda h: (output(h).float().argmax(-1),), chunk_size(output), hidden)[0]


def token_divergence(
    divergence: Callable[[Tensor, Tensor], Tensor],
    hidden: Float[Tensor, "tokens hidden"],
    ref_hidden: Float[Tensor, "tokens hidden"],
    output: nn.Module,
    ref_output: nn.Module,
    temperature: float = 1.0,
) -> Float[Tensor, "tokens"]:
    """An exact divergence between the distributions of two models, per token, in nats.

    `divergence` maps logits and reference logits [1, tokens, vocabulary] to [1, tokens] (see `rlhf.divergence`). Works
    in chunks, as `token_stats` does.
    """

    def values(h: Tensor, r: Tensor) -> tuple[Tensor]:
        logits, ref_logits = output(h)[None].float() / temperature, ref_output(r)[None].float() / temperature
        return (divergence(logits, ref_logits).squeeze(0),)

    return _in_chunks(values, chunk_size(output), hidden, ref_hidden)[0]


def _in_chunks(function: Callable[..., tuple[Tensor, ...]], size: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Apply a function to chunks of `size` tokens and concatenate; several chunks are recomputed in the backward."""
    if len(inputs[0]) <= size:
        return function(*inputs)
    parts = []
    for chunk in zip(*(x.split(size) for x in inputs), strict=True):
        again = torch.is_grad_enabled()
        parts.append(checkpoint(function, *chunk, use_reentrant=False) if again else function(*chunk))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
