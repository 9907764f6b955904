"""The last block where its states are read: elsewhere it computes keys and values, and nothing else.

A token's state after the last block matters only if somebody reads it: those that predict a response, or the last token
of a text that a reward model judges. No later block attends to the others. So the projection to queries, that of the
attention's output and the MLP run on the marked tokens alone, without a second implementation of any architecture:
hooks take the marked rows of what such a module is given, and put its results back between zeros.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Int
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.blocks import transformer_blocks
from rlhf.models.linear_layers import LINEAR

# Linear layers of attention that make queries or read the result: in Llama and most others, OPT, GPT-NeoX and GPT-2.
ATTENTION_ROWS = ("q_proj", "o_proj", "out_proj", "dense", "c_proj")
WORTHWHILE = 0.9  # the largest share of marked tokens for which taking rows out and putting them back is worth its time


def row_modules(model: PreTrainedModel) -> list[str]:
    """Paths in the model of the modules of its last block that map each token's state by itself, as far as is known.

    These are the children of the block that hold linear layers, such as its MLP, except for attention, of which it is
    the linear layers that make queries or read the result; one that makes keys as well is not among them.
    """
    blocks = transformer_blocks(model)
    if not blocks:
        return []
    last = next(path for path, module in model.named_modules() if module is blocks[-1])
    found = []
    for name, child in blocks[-1].named_children():
        linear = [path for path, module in child.named_modules() if isinstance(module, (*LINEAR, LoraLayer))]
        if "attn" not in name and "attention" not in name:
            found += [f"{last}.{name}"] if linear else []
        else:
            found += [f"{last}.{name}.{path}" for path in linear if path in ATTENTION_ROWS]
    return found


@contextmanager
def only_rows(model: PreTrainedModel, paths: Sequence[str], rows: Int[Tensor, "marked"], tokens: int) -> Iterator[None]:
    """Run the modules at `paths` on these rows of [1, tokens, width] alone; their results are zero elsewhere.

    A recomputation in the backward pass, when the hooks are gone, would differ.
    """

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0].index_select(1, rows), *args[1:]

    def put_back(_: nn.Module, __: tuple[Any, ...], result: Tensor) -> Tensor:
        return result.new_zeros(1, tokens, result.shape[-1]).index_copy(1, rows, result)

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            stack.enter_context(module.register_forward_pre_hook(take))
            stack.enter_context(module.register_forward_hook(put_back))
        yield
