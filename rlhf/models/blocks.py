"""The transformer blocks of one model: find them, recompute their activations, compile them and switch that off."""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from rlhf.models.adapters import selected, selection

# Variants that torch.compile may make of one function: padded rows pass its own limit of 8, because adapters, modes,
# single rows and single tokens need one each.
VARIANTS = 64
_LIMIT = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # the latter in torch 2.6
log = logging.getLogger(__name__)


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

    # the name since transformers 5.24, which warns of the older one
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": contexts})
    for block in model.modules():
        if (checkpoint := getattr(block, "_gradient_checkpointing_func", None)) is not None:
            # torch.compile would trace the checkpoint without `contexts`, so passes with gradients run uncompiled.
            block._gradient_checkpointing_func = torch.compiler.disable(checkpoint)


def compile_block(block: nn.Module, **options: Any) -> None:
    """Compile a block, with keyword arguments of torch.compile; a warning says if there are too many variants of it."""
    setattr(dynamo, _LIMIT, max(getattr(dynamo, _LIMIT), VARIANTS))
    block.compile(**options)
    assert block._compiled_call_impl is not None
    block._compiled_call_impl = _watched(block._compiled_call_impl)


def _watched(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with a warning once torch.compile has run it eagerly for its many variants."""

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = compiled(*args, **kwargs)
        if any(re.search("(recompile|cache_size)[_ ]limit", reason) for reason in counters["unimplemented"]):
            _warn_of_variants()
        return result

    return run


@functools.cache
def _warn_of_variants() -> None:
    """Warn, the first time only."""
    log.warning(
        "model.compile=true: torch.compile has made as many variants of a function as it may (%d for each function), "
        "and further shapes and modes run uncompiled, slowly; model.compile=false may be faster",
        getattr(dynamo, _LIMIT),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and back one by one: those of one model may be in different modes."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
