"""The sizes of a language model that its memory depends on, read off its skeleton."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.models.blocks import transformer_blocks
from rlhf.models.linear_layers import LINEAR, target_names
from rlhf.models.loading import skeleton
from rlhf.settings import LoraSettings, ModelSettings


class Sizes:
    """Numbers of weights, and widths; where blocks differ, those of the largest.

    `keys` is the width of the keys of all heads together, 0 for a state space, which has no key/value cache; `queries`
    is that of the queries. `inner` is the width of the MLP's activation. `linear` is the number of weights that
    quantisation applies to: of all linear layers except the language-model head.
    """

    def __init__(self, model: PreTrainedModel):
        config, output = model.config.get_text_config(), model.get_output_embeddings()
        self.model, self.layers = model, _largest(config, "num_hidden_layers")
        self.hidden, heads = _largest(config, "hidden_size"), _largest(config, "num_attention_heads")
        head = _largest(config, "head_dim") or (self.hidden // heads if heads else 0)
        self.keys, self.queries = head * (_largest(config, "num_key_value_heads") or heads), head * heads
        self.inner = _largest(config, "intermediate_size") or 4 * self.hidden
        self.vocabulary: int = config.vocab_size
        self.parameters = sum(p.numel() for p in model.parameters())
        layers = [m for m in model.modules() if isinstance(m, LINEAR) and m is not output]
        self.linear = sum(layer.weight.numel() for layer in layers)
        self.widest = max((layer.weight.numel() for layer in layers), default=0)

    @classmethod
    def of(cls, model: ModelSettings, vocabulary: int | None) -> "Sizes | None":
        """The sizes of a configured model; None if its configuration cannot be read.

        `vocabulary` is the number of tokens of a model that is created from a config.
        """
        lm = skeleton(model, vocabulary)
        return None if lm is None else cls(lm)

    @cached_property
    def outputs(self) -> int:
        """Output features of all linear layers below the language-model head together."""
        return self._outputs(self.model.base_model.modules())

    @cached_property
    def block_outputs(self) -> int:
        """The same of one block."""
        blocks = [self._outputs(block.modules()) for block in transformer_blocks(self.model)]
        return max(blocks, default=self.outputs // max(self.layers, 1))

    @cached_property
    def gated(self) -> int:
        """Width of the MLP's activation where a gate is multiplied with it, in which case autograd keeps it; else 0."""
        wide = [outputs for _, _, outputs in self._layers if outputs in (self.inner, 2 * self.inner)]
        return self.inner if sum(wide) >= 2 * self.layers * self.inner else 0

    def _outputs(self, modules: Iterable[nn.Module]) -> int:
        output = self.model.get_output_embeddings()
        return sum(_features(m)[1] for m in modules if isinstance(m, LINEAR) and m is not output)

    @cached_property
    def _layers(self) -> list[tuple[str, int, int]]:
        """The name, input and output features of every linear layer below the head."""
        layers = [(name, m) for name, m in self.model.base_model.named_modules() if isinstance(m, LINEAR)]
        return [(name, *_features(layer)) for name, layer in layers]

    def adapted(self, lora: LoraSettings) -> list[tuple[int, int]]:
        """Input and output features of the layers that a LoRA is put on; of all linear layers for r = 0."""
        whole, blocks = lora.r == 0, lora.layers_to_transform
        names = set[str]() if whole else target_names(lora, self.model)
        return [
            (inputs, outputs)
            for name, inputs, outputs in self._layers
            if whole or (name.rpartition(".")[2] in names and (not blocks or _block(name) in blocks))
        ]

    def adapter(self, lora: LoraSettings) -> int:
        """Number of parameters of a LoRA; DoRA has a magnitude for each output besides."""
        return sum(lora.r * (inputs + outputs) + lora.dora * outputs for inputs, outputs in self.adapted(lora))


def _block(name: str) -> int | None:
    """The number of the block that a module is in; None outside of blocks."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _features(layer: Any) -> tuple[int, int]:
    """(input, output) features of a linear layer; Conv1D's weight is transposed."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


def _largest(config: PreTrainedConfig, name: str) -> int:
    """A number of the configuration, the largest if there is one per block; 0 if it is missing."""
    found = getattr(config, name, None) or 0
    return max(found) if isinstance(found, list | tuple) else int(found)
