"""What a refusal proposes: changes with which the run was estimated to fit, and no others."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.models.memory import Work, estimate
from rlhf.pipeline import preflight
from rlhf.pipeline.fitting import advice, with_numbers
from tests.helpers.composed_config import composed_settings
from tests.helpers.memory_estimates import sizes_of

GIB = 2**30
LLAMA_7B = ("model.name_or_path=null", "model.config={model_type:llama,hidden_size:4096,intermediate_size:11008,"
            "num_hidden_layers:32,num_attention_heads:32}")  # fmt: skip
PAPER = ("recipe=paper", "model=llama_7b", *LLAMA_7B)


def proposed(gib: float, *overrides: str, stages: tuple[str, ...] = ("ppo",)) -> str:
    settings = composed_settings(*overrides)
    work, sizes = Work(stages, on_gpu=True), sizes_of(settings, 32_000)
    numbered = with_numbers(settings, sizes, work, int(gib * GIB))
    assert estimate(numbered, sizes, work).peak > gib * GIB  # else there is nothing to propose
    return advice(numbered, sizes, work, int(gib * GIB))


def test_what_alone_is_too_large_is_what_a_refusal_names() -> None:
    fixed = "ppo.microbatch_tokens=2048"
    assert proposed(80, *PAPER, fixed, "generation.batch_size=256") == "generation.batch_size=auto"
    passes = proposed(74, *PAPER, "ppo.microbatch_tokens=8192")
    assert passes == "ppo.microbatch_tokens=auto, or model.gradient_checkpointing=true, or quantization=nf4"
    whole = proposed(40, *PAPER, "lora=none", "model.gradient_checkpointing=true")
    assert whole == "lora=r8"
    both = proposed(74, *PAPER, "ppo.microbatch_tokens=8192", "generation.batch_size=256")
    assert both.startswith("generation.batch_size=auto with ppo.microbatch_tokens=auto, or ")


def test_other_stages_have_changes_of_their_own() -> None:
    sft = proposed(80, *PAPER, stages=("sft", "ppo"))
    assert sft == "lora@sft.lora=r8"
    assert proposed(24, *PAPER, "lora@reward.lora=r16_all", "quantization=nf4", stages=("reward",)) == (
        "reward.microbatch_tokens=1024, or model.gradient_checkpointing=true"
    )


def test_int8_that_does_not_fit_is_answered_by_nf4() -> None:
    neox = "{model_type:gpt_neox,hidden_size:6144,intermediate_size:24576,num_hidden_layers:44,num_attention_heads:64}"
    options = ("recipe=imdb_20b", "model.name_or_path=null", f"model.config={neox}", "quantization=int8")
    assert proposed(24, *options).startswith("quantization=nf4")
    assert proposed(2, *options) == "a smaller model, or more memory"


def test_a_stage_that_is_not_ppo_is_refused_too(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available", lambda _: int(1.0 * GIB))
    code, _, error = command("stage=sft", "sft.microbatch_tokens=65536", f"output_dir={tmp_path}")
    assert code == 2
    assert " for sft (" in error
    assert "allowed: sft.microbatch_tokens=80" in error
