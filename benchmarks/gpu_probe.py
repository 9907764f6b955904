"""What a GPU can do: rates of products and copies, attention, where the host waits for it."""

import collections
import itertools
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import commit, machine
from gpu_checks import GRAPHS, steps
from gpu_runner import Bench, Item
from torch import Tensor

aten = torch.ops.aten
# heads, heads of keys and values, width of a head, dtype
ATTENTION = {
    "7B": (32, 32, 128, torch.bfloat16), "smollm2": (9, 3, 64, torch.bfloat16),
    "7B float32": (32, 32, 128, torch.float32), "neox 20B": (64, 64, 96, torch.bfloat16),
    "neox 20B float32": (64, 64, 96, torch.float32),
}  # fmt: skip


def seconds(function: Callable[[], Any], device: str, times: int = 1) -> float:
    """Mean wall time of a call, with the device's work."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - started) / times


def rates(bench: Bench) -> dict[str, Any]:
    """The machine, FLOP/s of a bfloat16 (on a CPU: float32) product and bytes/s of a copy (read and written)."""
    size, dtype = (8192, torch.bfloat16) if bench.device == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**28 if bench.device == "cuda" else 2**22, device=bench.device)
    target = torch.empty_like(source)
    found = {}
    for name, work, function in (
        ("flops", 2 * size**3, lambda: torch.mm(left, right)),
        ("bandwidth", 2 * 4 * source.numel(), lambda: target.copy_(source)),
    ):
        seconds(function, bench.device)
        found[name] = work / seconds(function, bench.device, 10)
    free = torch.cuda.mem_get_info()[0] / 2**30 if bench.device == "cuda" else None
    return {"machine": machine(), "commit": commit(), "free_gib": free, **found}


def sdpa(bench: Bench) -> dict[str, Any]:
    """Milliseconds of each shape's first and second call, with cuDNN's attention allowed and not."""
    for allowed in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        laps = []
        for length in (401, 402, 403) if not bench.toy else (5, 6):
            shape, options = (4, 32, length, 128), {"device": bench.device, "dtype": torch.bfloat16}
            q, k, v = (torch.randn(shape, requires_grad=True, **options) for _ in range(3))  # type: ignore[call-overload]
            run = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
            laps.append(
                [round(1e3 * seconds(lambda run=run: run().sum().backward(), bench.device), 2) for _ in range(2)]
            )
        bench.say("sdpa", cudnn=allowed, first_and_second=laps)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return {}


def varlen(bench: Bench, heads: int, groups: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Attention over rows laid end to end by torch's own kernels: gaps to float64, and milliseconds beside padded sdpa.

    Eight rows; forward and backward pass. Gaps are the largest of the output and of the gradients of q, k, v.
    """
    lengths = torch.randint(300, 492, (8,) if not bench.toy else (1,)).tolist()
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(bench.device, torch.int32)
    options: Any = {"device": bench.device, "dtype": dtype}
    q, grad = (torch.randn(sum(lengths), heads, width, **options) for _ in range(2))
    k, v = (torch.randn(sum(lengths), groups, width, **options) for _ in range(2))
    wanted = rows_alone(q.double(), k.double(), v.double(), grad.double(), bounds.tolist())
    padded = [
        torch.randn(len(lengths), n, max(lengths), width, requires_grad=True, **options)
        for n in (heads, groups, groups)
    ]
    mask = torch.ones(len(lengths), 1, max(lengths), max(lengths), dtype=torch.bool, device=bench.device).tril()
    attend = partial(F.scaled_dot_product_attention, *padded, enable_gqa=heads != groups)
    kernels: dict[str, Callable[[], Any]] = {
        "flash": partial(flash, q, k, v, grad, bounds, max(lengths)),
        "efficient": partial(efficient, q, k, v, grad, bounds, max(lengths)),
        "rows alone": partial(rows_alone, q, k, v, grad, bounds.tolist()),
        "sdpa causal": lambda: attend(is_causal=True).sum().backward(),
        "sdpa mask": lambda: attend(attn_mask=mask).sum().backward(),
    }
    for name, kernel in kernels.items():
        try:
            got = kernel()
            gaps = [float((a.double() - b).abs().max()) for a, b in zip(got or [], wanted, strict=False)]
            lap = seconds(kernel, bench.device, 10 if not bench.toy else 1)
            again = all(torch.equal(a, b) for a, b in zip(got or [], kernel() or [], strict=True))
            bench.say("varlen", kernel=name, ms=round(1e3 * lap, 3), gaps=gaps, same_bits=again if got else None)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            bench.say("varlen", kernel=name, error=f"{type(error).__name__}: {error}"[:200])
    return {}


def rows_alone(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bounds: Sequence[int]) -> list[Tensor]:
    """Causal attention of each row by itself: the output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    parts = []
    for start, end in itertools.pairwise(bounds):
        row = [x[start:end].transpose(0, 1)[None].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in leaves]
        parts.append(F.scaled_dot_product_attention(*row, is_causal=True)[0].transpose(0, 1))
    joined = torch.cat(parts)
    return [joined.detach(), *torch.autograd.grad(joined, leaves, grad)]


def flash(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bounds: Tensor, longest: int) -> list[Tensor]:
    """As `rows_alone`, by the flash kernels of torch."""
    where = (bounds, bounds, longest, longest, 0.0, True)
    out, sums, state, unused, _ = aten._flash_attention_forward(q, k, v, *where, False, scale=None)
    return [out, *aten._flash_attention_backward(grad, q, k, v, out, sums, *where, state, unused, scale=None)]


def efficient(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bounds: Tensor, longest: int) -> list[Tensor]:
    """As `rows_alone`, by the memory-efficient kernels of torch, which take as many heads of keys as of queries."""
    groups = k.shape[1]
    q, k, v, grad = (x.repeat_interleave(q.shape[1] // x.shape[1], 1)[None] for x in (q, k, v, grad))
    out, sums, seed, offset, most, most_keys = aten._efficient_attention_forward(
        q, k, v, None, bounds, bounds, longest, longest, 0.0, 1, True
    )
    grads = aten._efficient_attention_backward(
        grad, q, k, v, None, out, bounds, bounds, most, most_keys, sums, 0.0, seed, offset, 1, False
    )
    return [out[0], grads[0][0], *(x[0].unflatten(1, (groups, -1)).sum(2) for x in grads[1:3])]


def syncs(bench: Bench) -> dict[str, Any]:
    """How often two toy PPO steps make the host wait for the device, by line of this project."""
    places: collections.Counter[str] = collections.Counter()

    def count(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if "/rlhf/" in f.filename and "-packages" not in f.filename]
            last = frames[-1] if frames else traceback.extract_stack()[-2]
            places[f"{last.filename.rpartition('/rlhf/')[-1]}:{last.lineno} {(last.line or '')[:50]}"] += 1

    with warnings.catch_warnings(action="always"):
        warnings.showwarning = count
        if bench.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        lines = steps(bench.device, "bfloat16", (GRAPHS,))
    if bench.device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return {"steps": len(lines), "syncs": sum(places.values()), "places": dict(places.most_common(30))}


def decoding(bench: Bench, heads: int, groups: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Attention of one token to a cache with room for 512, of which 300 to 491 are filled: milliseconds by way."""
    rows, room = (256, 512) if not bench.toy else (2, 16)
    options: Any = {"device": bench.device, "dtype": dtype}
    q = torch.randn(rows, heads, 1, width, **options)
    k, v = (torch.randn(rows, groups, room, width, **options) for _ in range(2))
    used = torch.randint(3 * room // 5, room, (rows,), device=bench.device, dtype=torch.int32)
    mask = torch.zeros(rows, 1, 1, room, **options)
    mask.masked_fill_(torch.arange(room, device=bench.device) >= used[:, None, None, None], -torch.inf)
    packed, scale = q.view(rows, groups, -1, width), width**-0.5

    def products() -> Tensor:
        return torch.baddbmm(
            mask.expand(-1, groups, packed.shape[2], -1).flatten(0, 1), packed.flatten(0, 1),
            k.flatten(0, 1).transpose(1, 2), alpha=scale,
        ).softmax(-1) @ v.flatten(0, 1)  # fmt: skip

    ways: dict[str, Callable[[], Tensor]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale),
        "sdpa a row per head": lambda: F.scaled_dot_product_attention(
            q, *(x.repeat_interleave(heads // groups, 1) for x in (k, v)), attn_mask=mask, scale=scale
        ),
        "products": products,
        "flash": lambda: aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, 1, room, 0.0, False, False, scale=scale, seqused_k=used
        )[0],
    }  # fmt: skip
    wanted = ways["sdpa"]().flatten()
    for name, way in ways.items():
        try:
            gap = float((way().flatten() - wanted).abs().max())
            lap = seconds(way, bench.device, 20 if not bench.toy else 1)
            bench.say("decoding", way=name, ms=round(1e3 * lap, 4), gap=gap)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            bench.say("decoding", way=name, error=f"{type(error).__name__}: {error}"[:200])
    return {"gib": 2 * k.numel() * k.element_size() / 2**30}


PROBES: dict[str, Item] = {
    "sdpa": sdpa,
    **{
        f"varlen {name}": partial(varlen, heads=a, groups=b, width=c, dtype=d)
        for name, (a, b, c, d) in ATTENTION.items()
    },
    **{
        f"decoding {name}": partial(decoding, heads=a, groups=b, width=c, dtype=d)
        for name, (a, b, c, d) in ATTENTION.items()
        if d == torch.bfloat16
    },
    "syncs": syncs,
}
