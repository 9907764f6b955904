"""A run's model as one plain model of transformers, or its adapter for a base that others have."""

import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging

from rlhf.errors import explained
from rlhf.files import ADAPTER_CONFIG
from rlhf.finished.run import FinishedRun
from rlhf.models.export import ADAPTER, HEAD, saved_head
from rlhf.models.loading import load_whole
from rlhf.models.tokens import settle_tokens


def merged(run: FinishedRun, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the run's adapter added in float32, then rounded once to `dtype`.

    A reward model becomes an `AutoModelForSequenceClassification` with one label, whose logit is the uncentred score.

    Raises:
        ModelError: model or adapter cannot be read, or do not belong together.
    """
    kind = AutoModelForSequenceClassification if run.stage == "reward" else AutoModelForCausalLM
    options = {"dtype": torch.float32, "trust_remote_code": run.settings.trust_remote_code, "use_safetensors": True}
    if run.stage == "reward":
        options["num_labels"] = 1
    if run.base is None:
        model = load_whole(kind, run.model, f"{run.stage} model", **options)
        if (run.model / HEAD).exists():  # float32 beside a model in a lower precision
            model.score.weight.data = saved_head(run.model)
    else:
        with explained(f"{run.model}: no adapter could be merged into {run.base}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries advise each other
            warnings.filterwarnings("error", message="Found missing adapter keys")
            logging.set_verbosity_error()  # of a reward model's base, that it has no score yet
            base = kind.from_pretrained(run.base, **options)
            model = PeftModel.from_pretrained(base, run.model).merge_and_unload()
    settle_tokens(model, run.tokenizer())
    return model.to(dtype).eval()


def write_adapter(run: FinishedRun, base: str | None, dtype: torch.dtype, folder: Path) -> None:
    """The adapter alone, in `dtype`, for `base` (None: where it lies here)."""
    with explained(f"{run.model}: no adapter could be read"):
        tensors = load_file(run.model / ADAPTER)
        settings = json.loads((run.model / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    save_file({key: value.to(dtype) for key, value in tensors.items()}, folder / ADAPTER)
    settings["base_model_name_or_path"] = base or str(run.base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def parameters(folder: Path) -> int:
    """How many numbers the model or adapter in `folder` holds, by the headers of its files."""
    total = 0
    for path in folder.glob("*model*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())  # noqa: SIM118
    return total
