"""How the losses of the tokens of a minibatch become one number, and the mean of a response: pure functions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.ppo import AllReduce, no_reduction


def response_weights(
    kind: str, lengths: Int[Tensor, "rows"], longest: int, all_reduce: AllReduce = no_reduction
) -> Float[Tensor, "rows"]:
    """The weight of each response's tokens, such that the mean of the weighted losses over all tokens is as asked for.

    `lengths` are the tokens of a minibatch's responses, N in number and T together.

        token_mean      1/T Σ_i Σ_t ℓ           weight 1            PPO; DAPO (Yu et al. 2025)
        sequence_mean   1/N Σ_i 1/|o_i| Σ_t ℓ   weight T / (N |o_i|)    GRPO (Shao et al. 2024)
        constant        1/N Σ_i 1/L Σ_t ℓ       weight T / (N L)    Dr. GRPO (Liu et al. 2025), L = `longest`

    `all_reduce` sums over the processes that share the minibatch.
    """
    if kind == "token_mean":
        return torch.ones(len(lengths), device=lengths.device)
    tokens, count = all_reduce(torch.stack([lengths.sum(), lengths.new_tensor(len(lengths))]))
    divisors = lengths if kind == "sequence_mean" else torch.full_like(lengths, longest)
    return tokens / count / divisors


def response_means(x: Float[Tensor, "tokens"], lengths: Int[Tensor, "rows"]) -> Float[Tensor, "tokens"]:
    """Give each token the mean of its response; `x` is row after row, `lengths` on the host. Differentiable."""
    means = torch.stack([part.mean() for part in x.split(lengths.tolist())])
    return means.repeat_interleave(lengths.to(x.device), output_size=len(x))
