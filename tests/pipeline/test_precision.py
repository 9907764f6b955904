"""`model.dtype=auto`: which dtype it stands for, and that caches and identities see that dtype."""

from pathlib import Path

import pytest
import torch

from rlhf.models.assembly import lora_config
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.pipeline import precision
from rlhf.stages.passes import compute_logprobs
from tests.helpers.composed_config import composed, composed_plan, composed_settings
from tests.helpers.tiny_models import tiny_model

SHAPE = "model_type:llama,hidden_size:768,intermediate_size:2048,num_hidden_layers:2,num_attention_heads:12"
LARGE = f"model.config={{{SHAPE}}}"


@pytest.mark.parametrize(
    ("flags", "found"),
    [("flags\t: fpu avx512f avx512_bf16", True), ("flags : avx512f amx_bf16", True), ("flags : avx512f", False),
     ("Features : fp asimd bf16", True), ("model name : avx512_bf16", False), ("", False)],
)  # fmt: skip
def test_a_cpu_says_whether_it_multiplies_bfloat16(flags: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert precision.cpu_multiplies_bfloat16(tmp_path / "cpuinfo") is found
    assert not precision.cpu_multiplies_bfloat16(tmp_path / "missing")


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)


def test_a_large_model_is_in_bfloat16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capable, model, dtype in ((True, LARGE, "bfloat16"), (False, LARGE, "float32"), (True, None, "float32")):
        monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda capable=capable: capable)
        assert composed_settings("model.dtype=auto", *([model] if model else [])).model.dtype == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_is_asked_where_the_run_trains_on_one(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert composed_settings("model.dtype=auto", LARGE).model.dtype == dtype
    assert composed_settings("model.dtype=auto", LARGE, "trainer=cpu").model.dtype == "float32"


def test_a_model_whose_configuration_is_not_at_hand_is_in_float32(able: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.models.sizes.skeleton", lambda *_: None)
    assert composed_settings("model.dtype=auto", LARGE).model.dtype == "float32"


def test_caches_identity_and_quantization_see_the_dtype_itself(able: None, tmp_path: Path) -> None:
    auto, low, full = (
        composed_plan(tmp_path, LARGE, "quantization=nf4", f"model.dtype={dtype}")
        for dtype in ("auto", "bfloat16", "float32")
    )
    assert auto.plain["model"]["dtype"] == auto.quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    assert auto.sft_folder == low.sft_folder != full.sft_folder
    assert auto.identity == low.identity != full.identity


@pytest.mark.parametrize("name", ["custom", "smollm2_135m", "tiny"])
def test_no_default_depends_on_the_processor(name: str) -> None:
    assert composed(f"model={name}").model.dtype == "float32"


def test_in_bfloat16_the_ratio_is_exact_and_log_probs_are_near() -> None:
    """The same weights in both dtypes: near each other, but not equal."""
    logprobs = {}
    for dtype in (torch.float32, torch.bfloat16):
        roles = Roles(tiny_model().to(dtype), dtype)
        roles.add_adapter("base", "policy", lora_config(composed_settings().lora, roles.trunk("reference")))
        roles.table["policy"] = Role("base", "policy")
        batch = Sequences.from_lists([[5, 6], [7]], [[8, 9, 10], [11, 12]])
        first, again = (compute_logprobs(roles.eval(), "policy", batch, 64, 1.0) for _ in range(2))
        assert torch.equal(first, again)
        logprobs[dtype] = first
    gap = (logprobs[torch.float32] - logprobs[torch.bfloat16]).abs()
    assert 0 < gap.max() < 0.05
