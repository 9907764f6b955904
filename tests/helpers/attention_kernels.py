"""CUDA's attention kernels for sequences that lie end to end, computed one sequence at a time on the host."""

from typing import Any

import torch
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None) -> Tensor:
    """Causal attention of sequences that lie end to end; all tensors are [tokens, heads, width]."""
    parts = []
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        rows = [x[start:end].transpose(0, 1)[None].float() for x in (query, key, value)]
        out = nn.functional.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts).to(query.dtype)


def flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *_: Any, scale: float | None = None) -> tuple[Tensor, ...]:
    unused = torch.zeros(1)
    return attend(q, k, v, starts, scale), torch.zeros(q.shape[1], len(q)), unused, unused.clone(), unused.clone()


def efficient(q: Tensor, k: Tensor, v: Tensor, bias: None, starts: Tensor, other: Tensor, longest: int, *_: Any,
              scale: float | None = None, **__: Any) -> tuple[Any, ...]:  # fmt: skip
    out = attend(q[0], k[0], v[0], starts, scale)[None]
    unused = torch.zeros(1)
    return out, torch.zeros(1, q.shape[2], q.shape[1]), unused, unused.clone(), longest, longest


KERNELS = {
    "_flash_attention_forward": flash,
    "_efficient_attention_forward": efficient,
}
