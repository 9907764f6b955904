"""`generation.engine=vllm`, as far as testable without vLLM and a GPU: refusals, and the adapter that it exports."""

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from rlhf.errors import ConfigError, ModelError
from rlhf.models.export import ADAPTER
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.factory import make_engine
from rlhf.rollout.vllm import write_adapter
from rlhf.settings import GenerationSettings
from rlhf.stages.ppo import PPO
from tests.helpers import vllm_stand_in
from tests.helpers.composed_config import compose_and_check
from tests.helpers.memory_estimates import estimate_of
from tests.helpers.ppo_stages import LORA, make_ppo, ppo_settings

CHOSEN = ["generation=vllm", "model.dtype=bfloat16"]
REFUSED = [
    ("lora=none", "lora.r=0 .* allowed: lora=r8"),
    ("lora.r=1024", "lora.r=1024 .* others up to 512"),
    ("quantization=nf4", "allowed: quantization=none, or generation.engine=native"),
    ("model.dtype=float32", "16 bits only, and model.dtype=float32; allowed: model.dtype=bfloat16"),
    ("trainer=ddp trainer.devices=2 trainer.accelerator=cpu", "for one process; allowed: trainer.devices=1"),
    ("generation.temperature=2.5", "generation.temperature=2.5: .* takes 0.01 to 2.0"),
    ("evaluation.temperature=0.001", "evaluation.temperature=0.001: .* takes 0.01 to 2.0"),
    ("generation.vllm.gpu_memory_utilization=1.5", "allowed: keywords of vllm.LLM, gpu_memory_utilization being"),
    ("generation.vllm.gpu_memory_utilization=most", "allowed: keywords of vllm.LLM, gpu_memory_utilization being"),
    (
        "+generation.vllm.enable_sleep_mode=false",
        "generation.vllm.enable_sleep_mode=False .* keywords of vllm.LLM but ",
    ),
    ("+generation.vllm.generation_config=auto", "generation.vllm.generation_config=auto .* keywords of vllm.LLM but "),
    ("generation.vllm=0.5", "generation.vllm=0.5 is not allowed; allowed: keys below it"),
]


@pytest.mark.parametrize(("overrides", "expected"), REFUSED, ids=[row[0] for row in REFUSED])
def test_unsupported_settings_are_refused(overrides: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as refused:
        compose_and_check(*CHOSEN, *overrides.split())
    assert str(refused.value).startswith(("generation.", "evaluation."))
    assert "\n" not in str(refused.value)


def test_a_missing_package_or_gpu_is_one_sentence(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    for found, expected in (
        (None, "rlhf: generation.engine=vllm needs the package vllm: pip install -e '.[vllm]' in the checkout\n"),
        (real("torch"), "rlhf: generation.engine=vllm, but torch sees no GPU here; allowed: generation.engine=native"),
    ):

        def find(name: str, *rest: object, found: object = found) -> object:
            return found if name == "vllm" else real(name, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        code, _, error = command(*CHOSEN, f"output_dir={tmp_path}")
        assert code == 2
        assert error.startswith(expected)
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("cache/*"))


@torch.no_grad()
def test_the_adapter_handed_over_is_the_policy(folders: SimpleNamespace, make_texts: Callable, tmp_path: Path) -> None:
    """Plain peft computes the same as the role on the folder of the SFT model, also after an update."""
    stage, batch = make_ppo(ppo_settings(), folders, tmp_path / "samples.jsonl"), make_texts(4, seed=0)
    roles = stage.roles.eval()
    assert roles.trunk("reference").name_or_path == str(folders.sft)
    assert roles.trunk("reference").peft_config["policy"].r == LORA.r
    seen = []
    for version in ("first", "second"):
        assert write_adapter(roles, "policy", tmp_path / version)
        assert {path.name for path in (tmp_path / version).iterdir()} == {ADAPTER, "adapter_config.json"}
        expected = roles.output("policy")(roles.hidden("policy", batch))
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / version).eval()
        torch.testing.assert_close(plain(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
        seen.append(expected)
        for parameter in roles.adapter_parameters("base", "policy").values():
            parameter.add_(0.01)
    assert not torch.allclose(*seen)


def test_roles_without_an_adapter_export_none(folders: SimpleNamespace, tmp_path: Path) -> None:
    settings = ppo_settings()
    assert not write_adapter(make_ppo(settings, folders, tmp_path / "a").roles, "reference", tmp_path / "none")
    settings.lora = replace(settings.lora, r=0)
    with pytest.raises(ValueError, match="role policy does not run on the model that vLLM serves"):
        write_adapter(make_ppo(settings, folders, tmp_path / "b").roles, "policy", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is there")
def test_what_goes_wrong_in_vllm_is_told_in_a_sentence(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples.jsonl")
    before = torch.random.get_rng_state()
    with pytest.raises(ModelError, match=r"vllm: the model cannot be served .ModuleNotFoundError: .*vllm") as told:
        make_engine(GenerationSettings(engine="vllm", max_new_tokens=8), folders.tokenizer, stage.roles)
    assert "\n" not in str(told.value)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- vLLM's memory, against a stand-in ---------------------------------------------------------------------------------


def start_and_sample(stage: PPO, **options: Any) -> None:
    """What a run does: make an engine and sample a rollout."""
    settings = GenerationSettings(engine="vllm", max_new_tokens=8, capture_logprobs="never", vllm=options)
    engine = make_engine(settings, stage.tokenizer, stage.roles)
    made = engine.generate(stage.roles, "policy", GenerationRequest([[5], [6]], 8, 1.0, torch.Generator()))
    assert made.lengths.tolist() == [2, 2]


def test_vllm_sleeps_unless_it_samples(
    monkeypatch: pytest.MonkeyPatch, folders: SimpleNamespace, tmp_path: Path
) -> None:
    llm = vllm_stand_in.install(monkeypatch)
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples.jsonl")
    start_and_sample(stage)
    assert llm.calls == ["start", "sleep", "wake up", "generate", "sleep"]
    monkeypatch.setattr(llm, "generate", None)  # calling it fails
    with pytest.raises(TypeError):
        start_and_sample(stage)
    assert llm.calls[5:] == ["wake up", "sleep"]


def test_a_second_run_finds_the_card_empty(
    monkeypatch: pytest.MonkeyPatch, folders: SimpleNamespace, tmp_path: Path
) -> None:
    """The stand-in fails if two engines hold memory at once, and if one is shut down asleep."""
    llm = vllm_stand_in.install(monkeypatch)
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples.jsonl")
    gc.freeze()
    start_and_sample(stage, gpu_memory_utilization=0.4)
    assert gc.get_freeze_count() == 0  # or this run's models would stay on the card
    start_and_sample(stage, gpu_memory_utilization=0.4)
    assert llm.calls.count("start") == 1
    start_and_sample(stage, gpu_memory_utilization=0.3)
    assert llm.calls[8:] == ["wake up", "shut down", "start", "sleep", "wake up", "generate", "sleep"]


def test_a_share_that_is_taken_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, folders: SimpleNamespace, tmp_path: Path
) -> None:
    llm = vllm_stand_in.install(monkeypatch)
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples.jsonl")

    def fail(_: object) -> None:
        raise RuntimeError("CUDA Error: out of memory\nat some line")

    monkeypatch.setattr(llm, "wake_up", fail)
    with pytest.raises(
        ModelError, match=r"^generation.engine=vllm: .* share .* back .RuntimeError: CUDA Error"
    ) as told:
        start_and_sample(stage)
    assert "\n" not in str(told.value)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_estimate_knows_what_vllm_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = estimate_of("model.dtype=bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 2**30, 10 * 2**30))
    served = estimate_of(*CHOSEN)
    assert served.phases["generating"] == served.phases["evaluating"] == 4 * 2**30
    assert served.peak == 4 * 2**30 + plain.peak_of()  # vLLM sleeps during updates
    assert served.peak_of("updating") == plain.peak_of("updating")
