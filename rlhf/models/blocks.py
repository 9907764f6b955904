"""The transformer blocks of one model: find them, recompute their activations, switch their compiled code off."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from rlhf.models.adapters import selected, selection


def transformer_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks a model is a stack of; empty if its class does not declare them (`_no_split_modules`)."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.base_model.modules() if type(module).__name__ in kinds]


def checkpoint_activations(model: PreTrainedModel, layers: Sequence[LoraLayer]) -> None:
    """Recompute the blocks' activations in the backward pass instead of storing them.

    `layers` are the model's LoRA layers. The recomputation runs with the adapter that the forward pass ran with.
    """

    def contexts() -> tuple[Any, Any]:
        # Called in the forward pass, for the context of the forward pass and that of the recomputation. The latter runs
        # in the backward pass, when another adapter may be selected.
        return nullcontext(), selected(layers, selection(layers))

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    for block in model.modules():
        if (checkpoint := getattr(block, "_gradient_checkpointing_func", None)) is not None:
            # torch.compile would trace the checkpoint without `contexts`, so passes with gradients run uncompiled.
            block._gradient_checkpointing_func = torch.compiler.disable(checkpoint)


@contextmanager
def uncompiled(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled blocks uncompiled; restore their compiled code on exit."""
    calls = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(blocks, calls, strict=True):
            block._compiled_call_impl = call
