"""Decoding with fixed shapes, as CUDA graphs need it, on the CPU: the same as decoding with a growing cache."""

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models.roles import Roles
from rlhf.rollout import fixed, native
from rlhf.rollout.decoding import prefill
from rlhf.rollout.factory import make_engine
from rlhf.rollout.fixed import FixedStep, block_length
from rlhf.rollout.graphs import StepRecorder
from rlhf.rollout.kv_cache import BufferCache
from rlhf.rollout.native import NativeEngine
from rlhf.settings import GenerationSettings
from tests.helpers.rollouts import EOS, KINDS, generate, response_rows, seeded_generator

FIXED, GROWING = NativeEngine(EOS, fixed=True), NativeEngine(EOS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Any]]:
    """For the end of each block: the addresses and shapes of all tensors that its steps used, step by step."""
    blocks: dict[int, list[Any]] = defaultdict(list)
    step = FixedStep.step

    def watched(self: FixedStep) -> torch.Tensor:
        tensors = [self.token, self.positions, self.place, self.visible[..., : self.end]]
        tensors += [x for pair in self.cache.buffers(self.end) for x in pair]
        blocks[self.end].append(tuple((x.data_ptr(), x.shape) for x in tensors))
        return step(self)

    monkeypatch.setattr(FixedStep, "step", watched)
    return blocks


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_fixed_shapes_give_the_same_tokens_and_logprobs(
    make_roles: Callable, seen: dict, monkeypatch: pytest.MonkeyPatch, kind: str, temperature: float
) -> None:
    """All steps of a block see the same shapes at the same addresses; between blocks, batches shrink to powers of 2."""
    monkeypatch.setattr(native, "CHECK_EVERY", 2)
    monkeypatch.setattr(fixed, "BLOCK", 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the adapters' weights
        roles = make_roles(kind)
    options: Any = {"max_new_tokens": 60, "temperature": temperature}
    found, growing = generate(FIXED, roles, **options), generate(GROWING, roles, **options)
    assert response_rows(found) == response_rows(growing)
    assert found.logprobs is not None
    assert growing.logprobs is not None
    for i, n in enumerate(found.lengths.tolist()):
        torch.testing.assert_close(found.logprobs[i, :n], growing.logprobs[i, :n], rtol=1e-4, atol=1e-5)
    width = 7  # of the longest prompt
    assert list(seen) == [width + 16, width + 32, width + 48, width + 60][: len(seen)]
    assert all(len(set(steps)) == 1 for steps in seen.values())
    assert [len(steps) for steps in list(seen.values())[:-1]] == [16] * (len(seen) - 1)
    sizes = [len_of_batch(steps) for steps in seen.values()]
    assert sizes[0] == 24
    assert len(set(sizes)) > 1 or temperature == 0  # few rows end early then
    assert all(size & (size - 1) == 0 for size in sizes if size != 24)
    assert sizes == sorted(sizes, reverse=True)


def len_of_batch(steps: list[Any]) -> int:
    """The number of rows of the first tensor of a block's first step."""
    return steps[0][0][1][0]


def test_blocks_are_about_equally_long_and_cover_all_steps() -> None:
    """Recording a block costs as much as several of its steps, so that there must be no short ones."""
    assert {steps: block_length(steps) for steps in (1, 48, 64, 95, 128, 130, 300, 512)} == {
        1: 8, 48: 48, 64: 64, 95: 96, 128: 64, 130: 72, 300: 64, 512: 64,
    }  # fmt: skip
    assert all(block_length(steps) % native.CHECK_EVERY == 0 for steps in range(1, 300))


def test_the_first_tokens_agree_in_bfloat16(make_roles: Callable) -> None:
    """Rounding depends on shapes in bfloat16, so that only the first tokens must agree."""
    roles = make_roles().bfloat16()
    roles.compute_dtype = torch.bfloat16
    fixed, growing = (generate(engine, roles, temperature=0.0) for engine in (FIXED, GROWING))
    assert torch.equal(fixed.ids[:, :2], growing.ids[:, :2])


def test_the_old_content_of_buffers_does_not_matter() -> None:
    """Unfilled memory can hold NaN, and the masked product is NaN then: `clear_the_rest` sets it to zero."""
    cache, place = BufferCache(1, 6), torch.tensor([2])
    states = torch.randn(3, 2, 2, 4, generator=seeded_generator())
    cache.update(states, states, 0)
    layer: Any = cache.layers[0]
    layer.keys[:, :, 2:] = layer.values[:, :, 2:] = torch.nan
    cache.clear_the_rest()
    assert (layer.keys[:, :, 2:] == 0).all()
    assert (layer.values[:, :, 2:] == 0).all()
    for slot in (2, 3, 2):  # writing a slot twice, as the steps before a capture do, changes nothing
        place.fill_(slot)
        keys, values = BufferCache.of(cache.buffers(6), place).update(states[:, :, :1], states[:, :, :1], 0)
        assert keys.shape == values.shape == (3, 2, 6, 4)
        assert torch.equal(keys[:, :, slot], states[:, :, 0])
    assert torch.equal(keys[:, :, :2], states)
    assert (keys[:, :, 4:] == 0).all()


def test_eager_attention_uses_a_growing_cache(make_roles: Callable, seen: dict) -> None:
    roles = make_roles(attn_implementation="eager")
    assert response_rows(generate(FIXED, roles)) == response_rows(generate(GROWING, roles))
    assert not seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing works on a GPU after a recording that failed")
def test_a_step_that_cannot_be_recorded_is_an_error_that_names_the_setting() -> None:
    """A recording that failed leaves PyTorch's random generator unusable, so that nothing may go on without it."""
    recorder, step = StepRecorder("Llama"), lambda: torch.ones(1)
    assert recorder(step) == 1  # the first call needs no recording
    expected = r"^generation\.cuda_graphs=auto: .* of Llama cannot be .*\(.*\); allowed: generation\.cuda_graphs=never$"
    for _ in range(2):
        recorder.start_again()
        assert recorder(step) == 1
        with pytest.raises(ModelError, match=expected):
            recorder(step)


@torch.no_grad()
def test_the_cache_is_freed_without_the_garbage_collector(make_roles: Callable) -> None:
    """On a GPU it is most of the memory, and PyTorch does not know that collecting would free it."""
    model, cache = make_roles().trunk("policy"), BufferCache(2, 6)
    prefill(model, torch.ones(3, 4, dtype=torch.long), cache)
    step = FixedStep(model, cache, torch.ones(3, 1, 1, 6, dtype=torch.bool), capture=True)
    step(*torch.ones(2, 3, dtype=torch.long), 4)
    freed = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert freed() is None
    finally:
        gc.enable()


def test_the_device_the_base_and_the_setting_select_fixed_shapes(
    make_roles: Callable, make_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, tokenizer = make_roles(), make_tokenizer()

    def is_fixed(chosen: str) -> bool:
        engine = make_engine(GenerationSettings(max_new_tokens=4, cuda_graphs=chosen), tokenizer, roles)
        assert isinstance(engine, NativeEngine)
        return engine.fixed

    assert GenerationSettings(max_new_tokens=4).cuda_graphs == "auto"
    assert not is_fixed("auto")
    monkeypatch.setattr(Roles, "device", torch.device("cuda"))
    assert [is_fixed("never"), is_fixed("auto")] == [False, True]
    roles.sharded = True
    assert not is_fixed("auto")
    roles.sharded = False
    weight = roles.trunk("policy").base_model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.to(torch.int8), requires_grad=False)
    assert not is_fixed("auto")


def test_a_count_that_is_read_late_changes_no_token(make_roles: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host learns a look late how many rows have ended, so that it never waits."""
    roles = make_roles()
    expected = generate(GROWING, roles, max_new_tokens=60, temperature=2.0)
    counts: list[int] = []

    def late(batch: Any) -> int:
        counts.append(int((~batch.finished).sum()))
        return counts[-2] if len(counts) > 1 else len(batch.finished)

    monkeypatch.setattr(native.DecodingBatch, "unfinished", late)
    for engine in (FIXED, GROWING):
        counts.clear()
        assert response_rows(generate(engine, roles, max_new_tokens=60, temperature=2.0)) == response_rows(expected)
        assert counts[0] > counts[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_graphs_on_a_gpu_give_the_same_tokens(make_roles: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating again with another adapter does not reuse the first graphs; blocks and batches differ."""
    monkeypatch.setattr(fixed, "BLOCK", 8)
    roles = make_roles().to("cuda")
    for _ in range(2):
        found, growing = generate(FIXED, roles), generate(GROWING, roles)
        assert response_rows(found) == response_rows(growing)
        for parameter in roles.adapter_parameters("base", "policy").values():
            parameter.data.add_(0.05)
    torch.nn.functional.dropout(torch.ones(4, device="cuda"))  # the generator works after recordings
