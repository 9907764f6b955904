"""Tensors that say they are on cuda:0 and compute on the CPU: they refuse mixes of devices and count host syncs.

`simulate` changes PyTorch for the whole process and cannot be undone: use a process of its own.
"""

import collections
import copy
import ctypes
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rlhf.rollout.graphs import StepRecorder
from tests.helpers.attention_kernels import KERNELS

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# operators whose result the host waits for
WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
syncs: collections.Counter[str] = collections.Counter()  # by the line of the package that caused them


class MixedDevicesError(RuntimeError):
    """An operator was given tensors of the host and of the device."""


class SimulatedTensor(Tensor):
    """A tensor on the simulated device; `inner` holds its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "SimulatedTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CUDA, requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})

    # PyTorch implements the following in C++, for a device that is really there.

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.inner = inner_of(value)

    def __getitem__(self, index: Any) -> Tensor:
        view, tensors = indexed(self, index)
        if tensors:
            return aten.index.Tensor(view, tensors)
        return aten.alias(view) if view is self else view

    def __setitem__(self, index: Any, value: Any) -> None:
        view, tensors = indexed(self, index)
        value = value if isinstance(value, Tensor) else torch.full((), value, dtype=self.dtype, device=CUDA)
        if tensors:
            aten.index_put_(view, tensors, value.to(self.dtype))
        else:
            view.copy_(value)

    def copy_(self, other: Tensor, non_blocking: bool = False) -> "SimulatedTensor":  # type: ignore[override]
        if not isinstance(other, SimulatedTensor) and not non_blocking:
            count_sync("copy_")
        self.inner.copy_(inner_of(other))
        return self

    def tolist(self) -> Any:
        count_sync("tolist")
        return self.inner.tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        made = SimulatedTensor(copy.deepcopy(self.inner.detach(), memo))
        return nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made


class SimulatedDevice(TorchDispatchMode):
    """Inside this context, `device="cuda"` makes simulated tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute an operator on the host, after checking the devices of its arguments.

    Raises:
        MixedDevicesError: a CUDA kernel would refuse these arguments.
    """
    name = func._schema.name.partition("::")[2]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    given = {isinstance(x, SimulatedTensor) for x in tensors}
    wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    on_device = True in given if wanted is None else wanted.type == "cuda"
    if name in INDEXING or name == "copy_":  # indices of the host may select from a tensor of the device
        on_device = isinstance(args[0], SimulatedTensor)
        if name in INDEXING and True in given and not on_device:
            raise MixedDevicesError(f"{name} at {place()}: indices on cuda:0 into a tensor of the host")
    elif name not in ("_to_copy", "to") and True in given and any(is_host_array(x) for x in tensors):
        raise MixedDevicesError(f"{name} at {place()}: tensors on cuda:0 and on the host")
    if waits(name, args, kwargs, given, on_device):
        count_sync(name)
    plain = {**kwargs, "device": torch.device("cpu")} if wanted is not None else dict(kwargs)
    if plain.get("pin_memory"):
        plain["pin_memory"] = False
    kernel = KERNELS.get(name, func) if on_device else func
    result = kernel(*tree_map(inner_of, args), **tree_map(inner_of, plain))
    known = {id(inner_of(x)): x for x in tensors}  # operators that work in place return their argument

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor) or name == "_local_scalar_dense":
            return x
        return known.get(id(x)) if id(x) in known else SimulatedTensor(x) if on_device else x

    return tree_map(wrapped, result)


def is_host_array(x: Tensor) -> bool:
    """A tensor that kernels of the device cannot read; a single number they can."""
    return not isinstance(x, SimulatedTensor) and x.dim() > 0


def waits(name: str, args: Any, kwargs: dict[str, Any], given: set[bool], on_device: bool) -> bool:
    """Whether the host waits for the device: for a value, for a number of elements, or for a copy from or to itself."""
    if name in ("_to_copy", "copy_"):
        return given != {on_device} and not kwargs.get("non_blocking")
    if name in INDEXING:
        return on_device and any(x is not None and (x.dtype == torch.bool or is_host_array(x)) for x in args[1])
    return True in given and name in WAITING


def indexed(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that numbers, slices and None make of a tensor, and what remains: a tensor or None per dimension."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        used = sum(i.dim() if is_mask(i) else 1 for i in index if i is not None and i is not Ellipsis)
        index = index[:at] + (slice(None),) * (x.dim() - used) + index[at + 1 :]
    remaining: list[Tensor | None] = []
    for i in index:
        dim = len(remaining)
        if i is None:
            x = x.unsqueeze(dim)
            remaining.append(None)
        elif isinstance(i, slice):
            x = x if i == slice(None) else aten.slice.Tensor(x, dim, i.start, i.stop, i.step or 1)
            remaining.append(None)
        elif isinstance(i, Tensor):
            remaining += [i, *[None] * (i.dim() - 1)] if is_mask(i) else [i]
        elif isinstance(i, list | range):
            remaining.append(torch.tensor(list(i)))
        else:
            x = aten.select.int(x, dim, int(i))
    while remaining and remaining[-1] is None:
        remaining.pop()
    # a mask covers several dimensions but is one entry of the list of indices
    masks = [n for n, i in enumerate(remaining) if i is not None and is_mask(i)]
    for n in reversed(masks):
        del remaining[n + 1 : n + remaining[n].dim()]  # type: ignore[union-attr]
    return x, remaining


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def inner_of(x: Any) -> Any:
    return x.inner if isinstance(x, SimulatedTensor) else x


def count_sync(name: str) -> None:
    syncs[f"{place()} ({name})"] += 1


def place() -> str:
    """The innermost line of the package that runs."""
    for frame in reversed(traceback.extract_stack()):
        if "/rlhf/" in frame.filename and "-packages" not in frame.filename and "/tests/" not in frame.filename:
            return f"{frame.filename.rpartition('/rlhf/')[2]}:{frame.lineno} {(frame.line or '')[:60]}"
    return "outside of the package"


def moved(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the simulated device; shared ones stay shared."""
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = nn.Parameter(SimulatedTensor(parameter.detach()), parameter.requires_grad)
                part._parameters[name] = done.setdefault(id(parameter), made)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else SimulatedTensor(buffer)
    return module


@contextmanager
def no_fork(*_: Any, **__: Any) -> Iterator[None]:
    yield


def simulate() -> None:
    """Let PyTorch believe in a device whose kernels are those of the host, with the host's random numbers."""
    torch.cuda._lazy_init = lambda: None
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    Tensor.pin_memory = lambda self, *_: self  # type: ignore[assignment, method-assign]
    # Copies arrive at once, and steps of decoding run instead of being recorded.
    torch.cuda.Event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)  # type: ignore[assignment, misc]
    StepRecorder.__call__ = lambda self, step: step()  # type: ignore[method-assign]
    give_cuda_a_guard()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)
    torch.random.fork_rng = no_fork  # type: ignore[assignment]


def give_cuda_a_guard() -> None:
    """Let CUDA have the guard of the meta device, which does nothing: PyTorch for the CPU has none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    if not guards[cuda]:
        guards[cuda] = guards[meta]
