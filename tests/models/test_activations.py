"""What passes are estimated to hold, against what PyTorch's allocator counts in a real forward and backward pass."""

import gc
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.models.activations import Passes
from rlhf.models.assembly import lora_config
from rlhf.models.export import save_model
from rlhf.models.loading import load_causal_lm
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.models.sizes import Sizes
from rlhf.settings import Settings
from tests.helpers.composed_config import composed_settings
from tests.helpers.tiny_models import word_tokenizer

ROWS, TIME = 4, 64
SHAPES = {
    "llama": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
}
TARGETS = {"llama": "q_proj,v_proj", "gpt_neox": "query_key_value"}


def peak(settings: Settings, folder: Path) -> int:
    """Bytes that a forward and a backward pass allocate at most, in padded batches as on a GPU."""
    base = load_causal_lm(settings.model, word_tokenizer(), folder, settings.quantization)
    roles = Roles(base, getattr(torch, settings.model.dtype))
    roles.add_adapter("base", "policy", lora_config(settings.lora, roles.trunk("reference")))
    roles.table["policy"] = Role("base", "policy")
    roles.train_only("policy")
    if settings.model.gradient_checkpointing:
        roles.checkpoint_activations()
    roles._unpadded = {"base": None}
    roles.train()
    batch = Sequences.from_lists([[5]] * ROWS, [[6] * (TIME - 1)] * ROWS)

    def step() -> None:
        roles.states("policy", batch, batch.predicting).float().pow(2).mean().backward()

    step()
    for parameter in roles.parameters():
        parameter.grad = None
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def written(model: str, folder: Path) -> Path:
    """A model of random weights in a folder."""
    config = AutoConfig.for_model(model_type=model, vocab_size=len(word_tokenizer()), **SHAPES[model])
    save_model(AutoModelForCausalLM.from_config(config), word_tokenizer(), folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("model", SHAPES)
def test_the_estimate_of_a_training_pass_is_within_a_quarter(
    model: str, kind: str, checkpointing: bool, tmp_path: Path
) -> None:
    """int8 holds the inputs of its layers past checkpointing: without them its estimate would be half of the truth."""
    if kind in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    written(model, tmp_path)
    quantized, dtype = kind in ("int8", "nf4"), kind if "float" in kind else "bfloat16"
    settings = composed_settings(
        "model=custom", f"model.name_or_path={tmp_path}", f"lora.target_modules=[{TARGETS[model]}]",
        f"model.gradient_checkpointing={checkpointing}", f"model.dtype={dtype}",
        f"quantization={kind if quantized else 'none'}",
    )  # fmt: skip
    if not quantized:
        settings.quantization = None
    sizes = Sizes.of(settings.model, None)
    assert sizes is not None
    found = peak(settings, tmp_path)
    estimated = Passes(settings, sizes).kept(ROWS * TIME, settings.lora)
    assert 0.8 < estimated / found < 1.25


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("layers", ["attention", "all"])
def test_the_estimate_of_dora_too(
    layers: str, model: str, dtype: str, dropout: float, checkpointing: bool, tmp_path: Path
) -> None:
    """It keeps two outputs of each layer besides: without them its estimate was half of the truth."""
    targets = "all-linear" if layers == "all" else f"[{TARGETS[model]}]"
    settings = composed_settings(
        "model=custom", f"model.name_or_path={written(model, tmp_path)}", f"lora.target_modules={targets}",
        "lora.dora=true", f"lora.dropout={dropout}", f"model.gradient_checkpointing={checkpointing}",
        f"model.dtype={dtype}",
    )  # fmt: skip
    settings.quantization = None
    sizes = Sizes.of(settings.model, None)
    assert sizes is not None
    estimated = Passes(settings, sizes).kept(ROWS * TIME, settings.lora)
    assert 0.75 < estimated / peak(settings, tmp_path) < 1.35
