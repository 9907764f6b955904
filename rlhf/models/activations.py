"""The memory of forward and backward passes, estimated from a model's sizes; all in bytes.

The terms were compared with what PyTorch's allocator reports on a CPU (tests/models/test_activations.py).
"""

from dataclasses import dataclass

import torch

from rlhf.models.heads import chunk_elements
from rlhf.models.loading import DTYPES
from rlhf.models.sizes import Sizes
from rlhf.settings import LoraSettings, Settings

FLOAT32 = 4


@dataclass(frozen=True)
class Passes:
    """Passes through one model at the precision that `settings` name; `on_gpu` says where."""

    settings: Settings
    sizes: Sizes
    on_gpu: bool = False

    @property
    def size(self) -> int:
        """Bytes of an activation, and of a weight that is not quantised."""
        return torch.finfo(DTYPES[self.settings.model.dtype]).bits // 8

    @property
    def bytes_per_linear_weight(self) -> float:
        """Bytes of a weight that quantisation applies to."""
        options = self.settings.quantization or {}
        if options.get("load_in_8bit"):
            return 1.0
        if options.get("load_in_4bit"):  # half a byte, and a scale per block of 64: in float32, or in 8 bits
            return 0.5 + (1 / 64 if options.get("bnb_4bit_use_double_quant") else FLOAT32 / 64)
        return float(self.size)

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in int8 or nf4."""
        return self.bytes_per_linear_weight < self.size

    @property
    def dequantized(self) -> int:
        """One quantised matrix, which passes unpack at a time."""
        return self.sizes.widest * self.size if self.quantized else 0

    def cast(self, lora: LoraSettings) -> int:
        """Copies that autocast makes of trained float32 weights and keeps for the duration of a pass."""
        return self.sizes.parameters * self.size if lora.r == 0 and self.size < FLOAT32 else 0

    def frozen(self, tokens: int) -> int:
        """A pass without gradients: at most the MLP's products of one block, and hidden states around them."""
        return self.dequantized + tokens * self.size * (2 * self.sizes.inner + self.sizes.gated + 4 * self.sizes.hidden)

    def kept(self, tokens: int, lora: LoraSettings) -> int:
        """What autograd keeps of a pass that trains `lora` (r = 0: the whole model), and gradients in the backward.

        Of every block: the outputs of its linear layers, the MLP's activation where it is gated, the input of both
        norms in float32, and the inputs of trained matrices. With checkpointing: the input of every block, and one
        block's recomputation.

        bitsandbytes' int8 layers hold their inputs besides, where checkpointing cannot drop them: its autograd function
        stores them as attributes of its context, not by `save_for_backward`.
        """
        sizes, size = self.sizes, self.size
        norms, trained = 2 * FLOAT32 * sizes.hidden, self._inputs_of_trained(lora) + self._outputs_of_dora(lora)
        if self.settings.model.gradient_checkpointing:
            one = size * (sizes.block_outputs + sizes.gated) + norms + trained // max(sizes.layers, 1)
            stored = sizes.layers * sizes.hidden * size + one
        else:
            stored = size * (sizes.outputs + sizes.layers * sizes.gated) + sizes.layers * norms + trained
        if (self.settings.quantization or {}).get("load_in_8bit"):
            stored += self._distinct_inputs * size
        gradients = size * 2 * (sizes.inner + sizes.hidden)
        return tokens * (stored + gradients) + self.dequantized + self.cast(lora) + self._product_of_dora(lora)

    def _outputs_of_dora(self, lora: LoraSettings) -> int:
        """Bytes per token of what DoRA scales in each layer: the base's output, and the adapter's in float32.

        Under dropout it has the base read the inputs again, without those that are dropped.
        """
        if not (lora.r and lora.dora):
            return 0
        kept = self.size + FLOAT32 * (2 if lora.dropout else 1)
        return kept * sum(outputs for _, outputs in self.sizes.adapted(lora))

    def _product_of_dora(self, lora: LoraSettings) -> int:
        """B A of the largest layer in float32, its sum with the weight, and the squares that its norm adds up."""
        if not (lora.r and lora.dora):
            return 0
        return 3 * FLOAT32 * max(inputs * outputs for inputs, outputs in self.sizes.adapted(lora))

    def _inputs_of_trained(self, lora: LoraSettings) -> int:
        """Bytes per token of the inputs of all trained matrices, and of their dropout masks, of a byte each.

        Where the fused layer runs without dropout, layers that read the same states share them.
        """
        inputs, dropout = sum(width for width, _ in self.sizes.adapted(lora)), lora.r > 0 and lora.dropout > 0
        if not dropout and not self.quantized:
            inputs = min(inputs, self._distinct_inputs)
        return inputs * (self.size + (1 if dropout else 0))

    @property
    def _distinct_inputs(self) -> int:
        """Width of what the linear layers of all blocks read: to attention, to its output, to the MLP, its product."""
        return self.sizes.layers * (3 * self.sizes.hidden + self.sizes.inner)

    def logits(self, tokens: int, models: int = 1) -> int:
        """Logits of a chunk of tokens in float32, of so many models: themselves, log-probs and their gradient."""
        return models * 3 * FLOAT32 * min(chunk_elements(self.on_gpu), tokens * self.sizes.vocabulary)

    def cache(self, rows: int, tokens: int) -> int:
        """Keys and values of so many texts."""
        return 2 * rows * tokens * self.sizes.layers * self.sizes.keys * self.size

    def decoding(self, rows: int, prompt: int, new: int) -> int:
        """Answering `rows` prompts at a time: the cache, and what is held beside it.

        That is at first a pass over the prompts with all of their last states, and later the keys and values of a block
        (copied when finished rows are dropped, and repeated for heads that share them) and five copies of the logits.
        """
        sizes = self.sizes
        prompts = self.frozen(rows * prompt) + rows * prompt * FLOAT32 * sizes.hidden
        copied = 2 * rows * (prompt + new) * max(sizes.keys, sizes.queries) * self.size
        return self.cache(rows, prompt + new) + max(prompts, copied + 5 * FLOAT32 * rows * sizes.vocabulary)
