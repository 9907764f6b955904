"""Save models and adapters in folders that transformers and peft can load without this project, and load them back."""

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import ModelError, explained
from rlhf.errors.machine import writing
from rlhf.files import ADAPTER_CONFIG
from rlhf.models.roles import Roles
from rlhf.models.tokens import settle_tokens

ADAPTER, HEAD = "adapter_model.safetensors", "head.safetensors"
PREFIX = "base_model.model."
MAGNITUDES = ".lora_magnitude_vector"  # DoRA's, which peft saves without the name of their parameter
# Of peft's ways to initialise an adapter, those that take a part out of the base's weights.
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a full causal language model or sequence classifier with its tokenizer, for `from_pretrained`.

    The saved configuration names the EOS ids and the pad token that the model was trained with (`settle_tokens`).
    """
    settle_tokens(model, tokenizer)
    with writing(folder):
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder, scoring=not model.can_generate())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, scoring: bool) -> None:
    """Save a tokenizer that pads on the right for scoring, or on the left for generation.

    With padding on the left, a model with absolute positions would read a text at shifted positions and score it
    differently. `generate` corrects the positions; a classifier's forward pass does not.
    """
    before = tokenizer.padding_side
    # `save_pretrained` writes only options that are in `init_kwargs`.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if scoring else "left"
    tokenizer.save_pretrained(folder)
    tokenizer.padding_side = before


def save_adapter(
    roles: Roles, role: str, config: LoraConfig, base: Path, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Save the role's adapter, and its head if it has one, in peft's format, with the model at `base` below it.

    A role without a head loads with `AutoPeftModelForCausalLM`. A head is saved as `score`; such a role loads with
    `PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), folder)`.

    Raises:
        ValueError: the role has no adapter.
    """
    trunk, adapter = roles.table[role]
    if adapter is None:
        raise ValueError(f"role {role} has no adapter to save")
    tensors = {PREFIX + _as_saved(key): value for key, value in roles.adapter_parameters(trunk, adapter).items()}
    has_head = role in roles.heads
    if has_head:
        tensors[PREFIX + "score.weight"] = roles.heads[role].weight  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / ADAPTER):
        save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, folder / ADAPTER)
    settings = {
        **{key: value for key, value in config.to_dict().items() if not isinstance(value, set)},
        "target_modules": sorted(config.target_modules or []),
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "modules_to_save": ["score"] if has_head else None,
        "base_model_name_or_path": str(base.resolve()),
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, default=str), encoding="utf-8")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, scoring=has_head)


def _as_saved(key: str) -> str:
    """peft's name of an adapter's parameter in a file."""
    return key.removesuffix(".weight") if key.endswith(f"{MAGNITUDES}.weight") else key


def load_adapter(roles: Roles, trunk: str, name: str, folder: Path) -> LoraConfig:
    """Add the adapter saved in `folder` to a trunk, under `name`; return its config.

    Raises:
        ModelError: the adapter cannot be read, or was trained on a model with other layers or shapes.
    """
    with explained(f"{folder}: no adapter could be loaded"):
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False
        if str(config.init_lora_weights).lower().startswith(REWRITING):
            raise ModelError(
                f"it was made with init_lora_weights={config.init_lora_weights}, which took a part out of the base's "
                "weights, and the base is shared; allowed: an adapter that peft has converted "
                "(path_initial_model_for_weight_conversion), or a whole model with it merged in"
            )
        config.init_lora_weights = True
        roles.add_adapter(trunk, name, config)
    stored = adapter_tensors(folder)
    parameters = roles.adapter_parameters(trunk, name)
    shapes, expected = ({key: value.shape for key, value in tensors.items()} for tensors in (stored, parameters))
    if shapes != expected:
        differing = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise ModelError(f"{folder}: the adapter was made for another model: {differing[0]} does not fit")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(stored[key])
    return config


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The LoRA matrices saved in `folder`, keyed by their path in the trunk."""
    tensors = _tensors(folder / ADAPTER)
    own = {key.removeprefix(PREFIX): value for key, value in tensors.items() if ".lora_" in key}
    return {f"{key}.weight" if key.endswith(MAGNITUDES) else key: value for key, value in own.items()}


def saved_head(folder: Path) -> Tensor:
    """The scalar head [1, hidden] saved in `folder`, with an adapter or with a full model."""
    if (folder / ADAPTER).exists():
        return _tensors(folder / ADAPTER)[PREFIX + "score.weight"]
    return _tensors(folder / HEAD)["score.weight"]


def _tensors(path: Path) -> dict[str, Tensor]:
    with explained(f"{path} cannot be read: delete {path.parent}, and it is built again"):
        return load_file(path)
