"""Decoding with fixed shapes, as CUDA graphs need it, on the CPU: the same as decoding with a growing cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.models.roles import Roles
from rlhf.rollout import native
from rlhf.rollout.decoding import FixedStep, captured
from rlhf.rollout.factory import make_engine
from rlhf.rollout.kv_cache import BufferCache
from rlhf.rollout.native import NativeEngine
from rlhf.settings import GenerationSettings
from tests.helpers.rollouts import EOS, KINDS, generate, response_rows, seeded_generator

FIXED, GROWING = NativeEngine(EOS, fixed=True), NativeEngine(EOS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[Any]]]:
    """For each batch, its size and the addresses and shapes of all tensors that its steps used."""
    batches: list[tuple[int, set[Any]]] = []
    step, keep = FixedStep.step, FixedStep.keep

    def watched(self: FixedStep) -> torch.Tensor:
        if not batches:
            batches.append((len(self.token), set()))
        tensors = [self.token, self.positions, self.place, self.visible]
        tensors += [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        batches[-1][1].add(tuple((x.data_ptr(), x.shape) for x in tensors))
        return step(self)

    def anew(self: FixedStep, rows: torch.Tensor) -> None:
        keep(self, rows)
        batches.append((len(rows), set()))

    monkeypatch.setattr(FixedStep, "step", watched)
    monkeypatch.setattr(FixedStep, "keep", anew)
    return batches


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_shapes_give_the_same_tokens_and_logprobs(
    make_roles: Callable, seen: list, monkeypatch: pytest.MonkeyPatch, kind: str, temperature: float
) -> None:
    """All steps of a batch see the same shapes at the same addresses, until the batch shrinks to a power of two."""
    monkeypatch.setattr(native, "CHECK_EVERY", 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the adapters' weights
        roles = make_roles(kind)
    options: Any = {"max_new_tokens": 60, "temperature": temperature}
    fixed, growing = generate(FIXED, roles, **options), generate(GROWING, roles, **options)
    assert response_rows(fixed) == response_rows(growing)
    assert fixed.logprobs is not None
    assert growing.logprobs is not None
    for i, n in enumerate(fixed.lengths.tolist()):
        torch.testing.assert_close(fixed.logprobs[i, :n], growing.logprobs[i, :n], rtol=1e-4, atol=1e-5)
    sizes = [size for size, _ in seen]
    assert sizes[0] == 24
    assert len(sizes) > 1 or temperature == 0  # few rows end early then
    assert all(size & (size - 1) == 0 for size in sizes[1:])
    assert sizes == sorted(sizes, reverse=True)
    assert all(len(places) <= 1 for _, places in seen)
    assert len(seen[0][1]) == 1


def test_the_first_tokens_agree_in_bfloat16(make_roles: Callable) -> None:
    """Rounding depends on shapes in bfloat16, so that only the first tokens must agree."""
    roles = make_roles().bfloat16()
    roles.compute_dtype = torch.bfloat16
    fixed, growing = (generate(engine, roles, temperature=0.0) for engine in (FIXED, GROWING))
    assert torch.equal(fixed.ids[:, :2], growing.ids[:, :2])


def test_the_old_content_of_buffers_does_not_matter() -> None:
    """Unfilled memory can hold NaN, and the masked product is NaN then: `fix` sets it to zero."""
    cache, place = BufferCache(1, 6), torch.tensor([2])
    states = torch.randn(3, 2, 2, 4, generator=seeded_generator())
    cache.update(states, states, 0)
    layer: Any = cache.layers[0]
    layer.keys[:, :, 2:] = layer.values[:, :, 2:] = torch.nan
    cache.fix(place)
    assert (layer.keys[:, :, 2:] == 0).all()
    assert (layer.values[:, :, 2:] == 0).all()
    for slot in (2, 3, 2):  # writing a slot twice, as the steps before a capture do, changes nothing
        place.fill_(slot)
        keys, values = cache.update(states[:, :, :1], states[:, :, :1], 0)
        assert keys.shape == values.shape == (3, 2, 6, 4)
        assert torch.equal(keys[:, :, slot], states[:, :, 0])
    assert torch.equal(keys[:, :, :2], states)
    assert (keys[:, :, 4:] == 0).all()


def test_eager_attention_uses_a_growing_cache(make_roles: Callable, seen: list) -> None:
    roles = make_roles(attn_implementation="eager")
    assert response_rows(generate(FIXED, roles)) == response_rows(generate(GROWING, roles))
    assert not seen


def test_decoding_that_cannot_be_captured_runs_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    def step() -> torch.Tensor:
        return torch.ones(1)

    if torch.cuda.is_available():
        pytest.skip("a GPU can capture it")
    assert captured(step) is step
    assert "no CUDA graph of the decoding step" in caplog.text


def test_the_device_and_the_setting_select_fixed_shapes(
    make_roles: Callable, make_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, tokenizer = make_roles(), make_tokenizer()

    def fixed(chosen: str) -> bool:
        engine = make_engine(GenerationSettings(max_new_tokens=4, cuda_graphs=chosen), tokenizer, roles)
        assert isinstance(engine, NativeEngine)
        return engine.fixed

    assert not fixed("auto")
    monkeypatch.setattr(Roles, "device", torch.device("cuda"))
    assert [fixed("never"), fixed("auto")] == [False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_on_a_gpu_give_the_same_tokens(make_roles: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """Generating again with another adapter does not reuse the first graphs."""
    roles = make_roles().to("cuda")
    for _ in range(2):
        fixed, growing = generate(FIXED, roles), generate(GROWING, roles)
        assert response_rows(fixed) == response_rows(growing)
        assert "no CUDA graph" not in caplog.text
        for parameter in roles.adapter_parameters("base", "policy").values():
            parameter.data.add_(0.05)
