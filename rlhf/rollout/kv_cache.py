"""The native engine's key/value cache: preallocated, and its rows can be dropped."""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


def cache_argument(model: PreTrainedModel) -> str:
    """The argument by which a model receives its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"


class _BufferLayer(CacheLayerMixin):
    """One layer's keys and values [batch, heads, capacity, width], allocated once and written in place.

    `filled` tokens are stored. If `place` is set, states are written there instead (see `BufferCache.of`).
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.filled = capacity, 0
        self.place: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers with the batch, heads, width and dtype of the first states."""
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, width)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new states and return views of all so far; or write to `place` and return the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.place is not None:
            self.keys.index_copy_(2, self.place, key_states)
            self.values.index_copy_(2, self.place, value_states)
            return self.keys, self.values
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that a query of this length attends to, offset of the first key)."""
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.filled + length, 0

    def get_seq_length(self) -> int:
        """Number of tokens stored."""
        return self.filled

    def get_max_length(self) -> int:
        """Number of tokens that fit."""
        return self.capacity

    get_max_cache_shape = get_max_length


class BufferCache(Cache):
    """A cache for `layers` layers and `capacity` tokens per row."""

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[_BufferLayer(capacity) for _ in range(layers)])

    @classmethod
    def of(cls, buffers: Sequence[tuple[Tensor, Tensor]], place: Tensor) -> "BufferCache":
        """A cache on existing keys and values [batch, heads, time, width] of each layer, fixed at `place` [1]."""
        cache = cls(len(buffers), buffers[0][0].shape[2])
        for layer, (keys, values) in zip(cache.layers, buffers, strict=True):
            layer.keys, layer.values, layer.place, layer.is_initialized = keys, values, place, True
        return cache

    @torch.no_grad()
    def clear_the_rest(self) -> None:
        """Zero what is not filled: a mask gives it weight 0, but 0 × uninitialised memory can be NaN."""
        for layer in self.layers:
            layer.keys[:, :, layer.filled :] = 0
            layer.values[:, :, layer.filled :] = 0

    def buffers(self, end: int) -> list[tuple[Tensor, Tensor]]:
        """Views of each layer's keys and values [batch, heads, end, width] of the first `end` places."""
        return [(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer in self.layers]

    @property
    def value_dtype(self) -> torch.dtype:
        """The dtype of the stored values; that of attention, because rotary positions may make keys float32."""
        dtype: torch.dtype = self.layers[0].values.dtype
        return dtype

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Drop all other rows, so that finished ones cost nothing more."""
        for layer in self.layers:
            layer.keep(rows)
