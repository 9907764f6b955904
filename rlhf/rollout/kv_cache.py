"""A preallocated key/value cache whose rows can be dropped: what the native engine decodes with."""

from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin


def cache_argument(model: PreTrainedModel) -> str:
    """By which name a model takes its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"


class _BufferLayer(CacheLayerMixin):
    """One layer's keys and values [batch, heads, capacity, width], allocated once and written in place."""

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.filled = capacity, 0
        self.place: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first states' batch, heads, width and dtype."""
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, width)
        self.values = value_states.new_empty(batch, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append the new states and return a view of all so far; once fixed, see `BufferCache.fix`."""
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
        """(keys that a query of this length attends to, offset of the first)."""
        length = query_length if isinstance(query_length, int) else len(query_length)
        return self.filled + length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.filled

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.capacity

    get_max_cache_shape = get_max_length


class BufferCache(Cache):
    """A cache of `layers` buffers for `capacity` tokens a row."""

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[_BufferLayer(capacity) for _ in range(layers)])

    @classmethod
    def of(cls, buffers: Sequence[tuple[Tensor, Tensor]], place: Tensor) -> "BufferCache":
        """One over the keys and values [batch, heads, time, width] of each layer that are there, fixed at `place`."""
        cache = cls(len(buffers), buffers[0][0].shape[2])
        for layer, (keys, values) in zip(cache.layers, buffers, strict=True):
            layer.keys, layer.values, layer.place, layer.is_initialized = keys, values, place, True
        return cache

    @torch.no_grad()
    def fix(self, place: Tensor) -> None:
        """From now on put a token's states at `place` [1], and return the whole buffers: their addresses stay.

        What is not filled yet becomes 0: a mask keeps attention from it, but 0 times what happened to be there may be
        no number.
        """
        for layer in self.layers:
            layer.place = place
            layer.keys[:, :, layer.filled :] = 0
            layer.values[:, :, layer.filled :] = 0

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these: what is finished costs nothing more."""
        for layer in self.layers:
            layer.keep(rows)
