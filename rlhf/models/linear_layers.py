"""The linear layers of a model, and which of them an adapter is put on."""

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.schema import ALL_LINEAR
from rlhf.settings import LoraSettings

LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's linear layer, with a transposed weight


def linear_names(lm: PreTrainedModel) -> set[str]:
    """Last parts of the names of the linear layers that can have an adapter (`q_proj`, …), or have one already.

    Left out are names that something else has too. Outside of the base model that is the language-model head, where an
    adapter would have no effect on hidden states and could not be merged without changing tied embeddings. Inside it
    that is a number in a list of layers, or the experts of a mixture (`_means_experts`). Nor can `out_proj` beside a
    recurrent state have an adapter: its kernels read the weight themselves, and peft refuses it. A router can be a
    linear layer that returns more than its products (Phi-3.5-MoE), to which no adapter's can be added.
    """
    inside, elsewhere = set[str](), set[str]()
    adapted = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    parts = {part for layer in adapted for part in layer.modules()} - set(adapted)
    layers = set(lm.base_model.modules()) - {lm.get_output_embeddings()}
    for path, module in lm.named_modules():
        if module not in parts:
            router = "router" in type(module).__name__.lower()
            linear = isinstance(module, (*LINEAR, LoraLayer)) and module in layers and not router
            (inside if linear else elsewhere).add(path.rpartition(".")[2])
    unfit = {"out_proj"} if lm._is_stateful else set()
    return {name for name in inside - elsewhere - unfit if not (name.isdigit() or _means_experts(lm, name))}


def _means_experts(lm: PreTrainedModel, name: str) -> bool:
    """Whether peft takes a name for that of a mixture's experts, which are no layers but stacked matrices.

    DeepSeek-V3 has a `down_proj` in its dense layers, too, where peft would then put no adapter.
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=lm, conversions=None)
    except ValueError:  # experts need several names at once
        return True
    return name not in config.target_modules


def target_names(lora: LoraSettings, lm: PreTrainedModel) -> set[str]:
    """The names of the layers that an adapter is put on: those that are listed, or all of this model."""
    return linear_names(lm) if lora.target_modules == ALL_LINEAR else set(lora.target_modules)
