"""Repeating a step on fixed memory addresses as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.errors import ModelError, first_line


class StepRecorder:
    """Calls a step, and replays a recording of it from the second call on, which saves launching each kernel.

    The first call runs as it is, because libraries initialise themselves in it. The second records a CUDA graph, which
    takes about as long as a step without a graph. A recording contains the addresses of all tensors: it is invalid once
    one of them is replaced, weights included. Successive recordings share their memory.

    `name` is that of the model, for errors. The step is not stored: it often belongs to the object that has the
    recorder, and such a circle would keep the key/value cache on the GPU until the next garbage collection.
    """

    def __init__(self, name: str):
        self.name = name
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def start_again(self) -> None:
        """The shapes or addresses have changed: the call after next records the step again."""
        self.calls = 0

    def __call__(self, step: Callable[[], Tensor]) -> Tensor:
        """The result of `step`; one that was recorded is overwritten by the next call.

        Raises:
            ModelError: the step cannot be recorded.
        """
        self.calls += 1
        if self.calls == 1:
            return step()
        if self.calls == 2:
            self.graph, self.result = self._record(step)
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def _record(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Autocast caches casted weights. Casts made while recording would be freed with the graph's memory.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        uncached = torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
        # The memory of the last recording can be used again only while its graph exists.
        pool = None if self.graph is None else self.graph.pool()
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile, for instance to log its memory.
            with uncached, torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = step()
        except Exception as error:
            # An error inside a recording makes its end fail as well. PyTorch cannot go on after that: its random
            # generator still believes that it is being recorded.
            cause = error.__context__ or error
            raise ModelError(
                f"generation.cuda_graphs=auto: a decoding step of {self.name} cannot be recorded as a CUDA graph "
                f"({type(cause).__name__}: {first_line(cause)}); allowed: generation.cuda_graphs=never"
            ) from error
        return graph, result
