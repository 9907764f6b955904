"""Attention within each of several sequences in one row, against torch's attention on each sequence alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models import isolated_attention as module
from rlhf.models.isolated_attention import Bounds, isolated_attention

CPU = torch.device("cpu")
SCALE = 0.3


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def states(time: int, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value [1, heads, time, width] with the memory layout that projections produce."""
    generator = torch.Generator().manual_seed(time)
    made = torch.randn(3, 1, time, heads, width, generator=generator, dtype=dtype).transpose(2, 3)
    return [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in made]


def bounds_of(lengths: list[int], device: torch.device = CPU) -> Bounds:
    return Bounds.of(torch.cat([torch.arange(length) for length in lengths]), device)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([scaled_dot_product_attention(*part, is_causal=True, scale=SCALE) for part in parts], dim=2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([1, 1, 2, 3, 3, 3, 17]), min_size=1, max_size=8))
def test_each_sequence_is_computed_as_if_alone(lengths: list[int]) -> None:
    """Values and all three gradients, for runs of equal lengths (computed as a batch) and for others."""
    inputs = states(sum(lengths))
    out = isolated_attention(*inputs, bounds_of(lengths), SCALE)
    expected = one_by_one(*inputs, lengths).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), inputs) for x in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bounds_begin_where_positions_do() -> None:
    bounds = bounds_of([3, 1, 5])
    assert bounds.starts.tolist() == [0, 3, 4, 9]
    assert bounds.longest == 5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "dtype", "tolerance"),
    [
        (4, 4, 128, torch.bfloat16, 2e-2),
        (6, 2, 64, torch.bfloat16, 2e-2),
        (6, 2, 64, torch.float16, 4e-3),
        (4, 4, 96, torch.float32, 2e-5),
        (6, 2, 12, torch.float32, 2e-5),
        (4, 1, 300, torch.bfloat16, 2e-2),
    ],
)
def test_shared_heads_and_low_precision_on_each_kind_of_device(
    heads: int, key_heads: int, width: int, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    """Values and gradients against attention in float64 on each sequence alone, relative to the largest entry."""
    lengths, place = [40, 1, 17, 17, 130], torch.device(device)
    whole = states(sum(lengths), heads, width)
    exact = [whole[0], *(x[:, :key_heads].detach().requires_grad_() for x in whole[1:])]
    ours = [x.detach().to(place, dtype).requires_grad_() for x in exact]
    shared = [exact[0], *(x.repeat_interleave(heads // key_heads, 1) for x in exact[1:])]
    expected = one_by_one(*shared, lengths).transpose(1, 2)
    out = isolated_attention(*ours, bounds_of(lengths, place), SCALE)
    found = [out, *torch.autograd.grad(out.double().sin().sum(), ours)]
    wanted = [expected, *torch.autograd.grad(expected.sin().sum(), exact)]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert float((a.double().cpu() - b).abs().max()) < tolerance * float(b.abs().max())


def test_the_derivative_of_short_sequences_is_rounded_to_16_bits_only_once() -> None:
    """On the CPU it is computed in float32, where torch is faster. In bfloat16 this error is 2.5e-3."""
    lengths = [40, 1, 17, 17, 60]
    exact = states(sum(lengths), heads=6, width=64)
    halves = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in halves]
    grad = torch.randn(1, sum(lengths), 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = torch.autograd.grad(isolated_attention(*halves, bounds_of(lengths), SCALE), halves, grad)[2].double()
    wanted = torch.autograd.grad(one_by_one(*exact, lengths).transpose(1, 2), exact, grad.double())[2]
    assert float((found - wanted).norm() / wanted.norm()) < 2**-9  # a relative error of 2⁻⁸ at most, 1.7e-3 on average


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [5], [3, 3, 7, 1]])
def test_the_operators_registered_with_the_compiler_are_correct(lengths: list[int], dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides of results and gradients; nothing is changed in place."""
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in states(sum(lengths), dtype=dtype)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    close = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    torch.library.opcheck(module._attend, (*inputs, *bounds_of(lengths), SCALE), test_utils=tests, **close)


def test_the_compiler_can_trace_the_memory_efficient_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes alone, as the compiler sees them. Without our operator torch's description of the derivative fails."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    inputs = [x.detach().to("meta", torch.float32).requires_grad_() for x in states(12)]
    out = module._memory_efficient(*inputs, Bounds(torch.empty(4, dtype=torch.int32, device="meta"), 5), SCALE)
    out.sum().backward()
    assert [x.grad.shape for x in inputs if x.grad is not None] == [x.shape for x in inputs]
