"""The weights of a run for an export: merged into one transformers model, or the adapter alone."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf.errors import explained
from rlhf.files import ADAPTER_CONFIG
from rlhf.finished.run import FinishedRun
from rlhf.models.export import ADAPTER, HEAD, saved_head
from rlhf.models.loading import load_whole
from rlhf.models.merging import merged
from rlhf.models.tokens import settle_tokens


def merged_model(run: FinishedRun, dtype: torch.dtype) -> PreTrainedModel:
    """The run's model with its adapter merged into the base: in float32, then rounded once to `dtype`.

    Returns:
        An `AutoModelForCausalLM`; for a reward model, an `AutoModelForSequenceClassification` with one label, whose
        logit is the score before centring.

    Raises:
        ModelError: model or adapter cannot be read, or the adapter does not fit the model.
    """
    kind = AutoModelForSequenceClassification if run.stage == "reward" else AutoModelForCausalLM
    options = {"dtype": torch.float32, "trust_remote_code": run.settings.trust_remote_code, "use_safetensors": True}
    if run.stage == "reward":
        options["num_labels"] = 1
    if run.base is None:
        model = load_whole(kind, run.model, f"{run.stage} model", **options)
        if (run.model / HEAD).exists():  # the head in float32, saved beside a model in a lower precision
            model.score.weight.data = saved_head(run.model)
    else:
        model = merged(kind, run.base, run.model, **options)
    settle_tokens(model, run.tokenizer())
    return model.to(dtype).eval()


def write_adapter(run: FinishedRun, base: str | None, dtype: torch.dtype, folder: Path) -> None:
    """Write the adapter alone into `folder`.

    Args:
        run: a run with an adapter.
        base: the Hub's name of its SFT model; None for the SFT model's path on this machine.
        dtype: of the written weights.
        folder: an existing folder.

    Raises:
        ModelError: the adapter cannot be read.
    """
    with explained(f"{run.model}: no adapter could be read"):
        tensors = load_file(run.model / ADAPTER)
        settings = json.loads((run.model / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / ADAPTER)
    settings["base_model_name_or_path"] = base or str(run.base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def count_parameters(folder: Path) -> int:
    """The number of parameters of the model or adapter in `folder`, from the headers of its safetensors files."""
    total = 0
    for path in folder.glob("*model*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    return total
