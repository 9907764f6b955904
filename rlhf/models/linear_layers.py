"""The linear layers of a model, and which of them an adapter is put on."""

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.settings import ALL_LINEAR, LoraSettings

LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's linear layer, with a transposed weight


def linear_names(lm: PreTrainedModel) -> set[str]:
    """Last parts of the names of the linear layers that can have an adapter (`q_proj`, …), or have one already.

    Names that also occur outside of the base model, such as that of the language-model head, are left out. An adapter
    there would have no effect on hidden states, and could not be merged without changing tied embeddings.
    """
    inside, outside = set[str](), set[str]()
    adapted = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    parts = {part for layer in adapted for part in layer.modules()} - set(adapted)
    layers = set(lm.base_model.modules()) - {lm.get_output_embeddings()}
    for name, module in lm.named_modules():
        if isinstance(module, (*LINEAR, LoraLayer)) and module not in parts:
            (inside if module in layers else outside).add(name.rpartition(".")[2])
    return inside - outside


def target_names(lora: LoraSettings, lm: PreTrainedModel) -> set[str]:
    """The names of the layers that an adapter is put on: those that are listed, or all of this model."""
    return linear_names(lm) if lora.target_modules == ALL_LINEAR else set(lora.target_modules)
