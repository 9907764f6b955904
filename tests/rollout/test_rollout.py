"""Both engines against transformers' own `generate`, and their log-probs against plain forward passes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.rollout import native
from rlhf.rollout.factory import make_engine, use_captured_logprobs
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine, sample_tokens
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.settings import GenerationSettings
from rlhf.stages.passes import compute_logprobs, compute_values
from tests.helpers.calls import record_calls
from tests.helpers.rollouts import EOS, KINDS, LIMIT, PAD, PROMPTS, generate, response_rows, seeded_generator


def forced(model: nn.Module, prompt: Sequence[int], response: Sequence[int], temperature: float) -> Tensor:
    """Log-probs of a response [time], from a forward pass of a plain model on that row alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    table = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return table[torch.arange(len(response)), torch.tensor(response)]


@pytest.fixture(params=["llama", "neox"])
def roles(request: pytest.FixtureRequest, make_roles: Callable) -> Roles:
    return make_roles(request.param)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_with_several_answers_is_read_once(
    make_roles: Callable, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """The answers are those of an engine that reads it for each of them: here, because other prompts are in the way."""
    roles, read = make_roles("llama", attn_implementation=attention), record_calls(monkeypatch, native, "prefill")
    shared = generate(NativeEngine(EOS), roles, PROMPTS)
    others = [[3 + row, 7, 9] for row in range(len(PROMPTS))]
    apart = generate(NativeEngine(EOS), roles, [*PROMPTS, *others])
    assert [len(args[1]) for args, _ in read] == [6, 2 * len(PROMPTS)]
    assert response_rows(shared) == response_rows(apart)[: len(PROMPTS)]
    assert len(set(map(tuple, response_rows(shared)))) > 6
    assert shared.logprobs is not None
    assert apart.logprobs is not None
    for row, length in enumerate(shared.lengths.tolist()):  # beyond it is what an ended row went on to sample
        one, other = (generated.logprobs[row, :length] for generated in (shared, apart))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# -- the same tokens as Hugging Face ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_generate(make_roles: Callable, kind: str, attention: str) -> None:
    """The reference is `generate` row by row without padding; ragged batches of both engines must agree with it."""
    roles = make_roles(kind, attn_implementation=attention)
    model = roles.copy_trunk("policy")
    expected = []
    for prompt in PROMPTS[:6]:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    native = generate(NativeEngine(EOS), roles, PROMPTS[:6], temperature=0.0)
    assert response_rows(native) == expected
    assert response_rows(generate(TransformersEngine(EOS, PAD), roles, PROMPTS[:6], temperature=0.0)) == expected
    assert native.logprobs is not None
    for i, row in enumerate(expected):
        torch.testing.assert_close(
            native.logprobs[i, : len(row)], forced(model, PROMPTS[i], row, 1.0), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_captured_logprobs_are_those_of_the_model(roles: Roles, temperature: float) -> None:
    generated = generate(NativeEngine(EOS), roles, temperature=temperature)
    rows = response_rows(generated)
    batch = Sequences.from_lists(PROMPTS, rows)
    scored, model = compute_logprobs(roles, "policy", batch, 64, temperature), roles.copy_trunk("policy")
    assert generated.logprobs is not None
    for i, row in enumerate(rows):
        expected = forced(model, PROMPTS[i], row, temperature)
        torch.testing.assert_close(generated.logprobs[i, : len(row)], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scored[i, : len(row)], expected, rtol=1e-4, atol=1e-4)
        assert (scored[i, len(row) :] == 0).all()


def test_values_captured_on_the_policys_trunk_are_those_of_a_pass(
    make_roles: Callable, make_tokenizer: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values captured while sampling equal those of a pass over the sequences, though finished rows are dropped."""
    monkeypatch.setattr("rlhf.rollout.native.CHECK_EVERY", 2)
    roles, prompts = make_roles(), [" ".join(f"w{i}" for i in prompt) for prompt in PROMPTS]
    settings = GenerationSettings(max_new_tokens=LIMIT, batch_size=5)
    engine = make_engine(settings, make_tokenizer(), roles)

    def sampled() -> Rollouts:
        return rollout(engine, roles, "policy", make_tokenizer(), prompts, settings, torch.Generator().manual_seed(3))

    assert sampled().values is None  # the value function is a separate adapter
    roles.table["value"] = roles.table["policy"]
    roles.add_head("value", zero=False)
    found = sampled()
    lengths = found.mask.sum(1)
    assert lengths.min() < lengths.max()
    assert found.values is not None
    torch.testing.assert_close(found.values, compute_values(roles, found.sequences, 64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_of_generate_agree_with_the_scoring_pass(roles: Roles, temperature: float) -> None:
    """`generate` returns the scores that it sampled from: our scoring pass must find the same log-probs."""
    prompts = [[5, 9, 7], [40, 41, 3], [6, 8, 8], [49, 3, 12]]
    ids, model = torch.tensor(prompts), roles.copy_trunk("policy")
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=True, temperature=temperature,
        top_k=0, top_p=1.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    told = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    responses = [row[: row.index(EOS) + 1] if EOS in row else row for row in out.sequences[:, 3:].tolist()]
    scored = compute_logprobs(roles, "policy", Sequences.from_lists(prompts, responses), 64, temperature)
    for i, row in enumerate(responses):
        torch.testing.assert_close(scored[i, : len(row)], told[i, : len(row)], rtol=1e-4, atol=1e-4)


def test_transformers_engine_samples_as_generate_does(roles: Roles) -> None:
    """Prompts of equal length need no padding, so that plain `generate` with the same seed gives the same tokens."""
    prompts = [[5, 9, 7], [40, 41, 3]] * 4
    got = response_rows(generate(TransformersEngine(EOS, PAD), roles, prompts, temperature=0.7))
    ids = torch.tensor(prompts)
    torch.manual_seed(int(torch.randint(2**62, (), generator=seeded_generator())))
    out = (
        roles.copy_trunk("policy")
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LIMIT,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            top_p=1.0,
        )[:, 3:]
        .tolist()
    )
    assert got == [row[: row.index(EOS) + 1] if EOS in row else row for row in out]


# -- independence of batch, order and global state -------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 1000])
def test_dropping_rows_changes_no_token(roles: Roles, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    whole = generate(NativeEngine(EOS), roles, max_new_tokens=40)
    assert (
        len({n for n in whole.lengths.tolist() if n < 40}) > 3
    )  # rows end at different steps, so that some are dropped
    monkeypatch.setattr(native, "CHECK_EVERY", every)
    other = generate(NativeEngine(EOS), roles, max_new_tokens=40)
    assert response_rows(other) == response_rows(whole)
    assert whole.logprobs is not None
    assert other.logprobs is not None
    for i, n in enumerate(whole.lengths.tolist()):
        torch.testing.assert_close(other.logprobs[i, :n], whole.logprobs[i, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", [NativeEngine(EOS), TransformersEngine(EOS, PAD)])
def test_the_same_seed_gives_the_same_ids(make_roles: Callable, engine: object) -> None:
    roles = make_roles()
    before = torch.random.get_rng_state()
    first, again, other = (response_rows(generate(engine, roles, generator=seeded_generator(s))) for s in (3, 3, 4))
    assert first == again
    assert first != other
    assert torch.equal(torch.random.get_rng_state(), before)  # and the global generator is not used


@pytest.mark.parametrize("engine", [NativeEngine(EOS), TransformersEngine(EOS, PAD)])
def test_eos_is_kept_and_never_appended(make_roles: Callable, engine: object) -> None:
    generated = generate(engine, make_roles(), max_new_tokens=30)
    ended = [row[-1] == EOS for row in response_rows(generated)]
    assert 0 < sum(ended) < len(ended)
    for row, end in zip(response_rows(generated), ended, strict=True):
        assert EOS not in row[:-1]
        assert end or len(row) == 30


@pytest.mark.parametrize("role", ["policy", "reference"])
def test_sampled_frequencies_match_the_softmax(make_roles: Callable, role: str) -> None:
    roles, rows = make_roles(), 4000
    got = generate(NativeEngine(EOS), roles, [[5, 9, 7]] * rows, role=role, max_new_tokens=1, temperature=1.3).ids[:, 0]
    with torch.no_grad():
        logits = roles.copy_trunk(role)(input_ids=torch.tensor([[5, 9, 7]])).logits[0, -1]
    expected = (logits / 1.3).softmax(-1) * rows
    counts = torch.bincount(got, minlength=50).float()
    bins = torch.cumsum(expected >= 5, 0) * (expected >= 5)  # rare tokens share bin 0
    observed, wanted = (torch.zeros(51).index_add(0, bins, x) for x in (counts, expected))
    kept = wanted > 0
    statistic, freedom = float(((observed - wanted)[kept] ** 2 / wanted[kept]).sum()), int(kept.sum()) - 1
    assert freedom > 5
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom)  # p ≈ 0.001, one-sided; the seed is fixed


@given(st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 2**30), st.sampled_from([0.1, 1.0, 3.0]))
def test_choose_inverts_the_distribution(draw: float, seed: int, temperature: float) -> None:
    """The token whose share of [0, 1) contains the draw, never one of probability 0."""
    logits = torch.randn(1, 12, generator=seeded_generator(seed)) * 4
    logits[0, [0, 5, 11]] = -torch.inf
    token, logprob = sample_tokens(logits, temperature, torch.tensor([draw]), True)
    logprobs = (logits / temperature).log_softmax(-1)
    assert int(token) not in (0, 5, 11)
    assert float(logprob) == pytest.approx(float(logprobs[0, token]), abs=1e-5)
    edges = logprobs.double().exp().cumsum(-1)[0]
    low = float(edges[int(token) - 1])
    assert low - 2e-6 <= draw <= float(edges[token]) + 2e-6


# -- whole rollouts --------------------------------------------------------------------------------------------------


def texts(rows: int) -> list[str]:
    return [" ".join(f"w{i}" for i in prompt) for prompt in (PROMPTS * 3)[:rows]]


@pytest.mark.parametrize("engine", ["native", "transformers"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_rollout_keeps_order_ids_and_eos(make_roles: Callable, make_tokenizer: Callable, engine: str, pad: str) -> None:
    roles, tokenizer = make_roles(), make_tokenizer(pad)
    settings = GenerationSettings(engine=engine, max_new_tokens=24, batch_size=5)
    prompts = texts(13)
    result = rollout(
        make_engine(settings, tokenizer, roles), roles, "policy", tokenizer, prompts, settings, seeded_generator()
    )
    assert result.prompts == prompts
    batch = result.sequences
    assert 0 < int(result.ended.sum()) < 13
    scored, model = compute_logprobs(roles, "policy", batch, 64, 1.0), roles.copy_trunk("policy")
    assert (result.logprobs is None) == (engine == "transformers")
    for i, (text, p, n) in enumerate(zip(prompts, batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)):
        assert batch.ids[i, :p].tolist() == tokenizer(text)["input_ids"]
        response = batch.ids[i, p:n].tolist()
        assert EOS not in response[:-1]
        assert (response[-1] == EOS) == bool(result.ended[i])
        assert bool(result.ended[i]) or len(response) == 24
        assert result.responses[i] == tokenizer.decode(response, skip_special_tokens=True)
        assert result.mask[i].sum() == len(response)
        expected = forced(model, batch.ids[i, :p].tolist(), response, 1.0)
        torch.testing.assert_close(scored[i, : n - p], expected, rtol=1e-4, atol=1e-4)
        if result.logprobs is not None:
            torch.testing.assert_close(result.logprobs[i, : n - p], expected, rtol=1e-4, atol=1e-4)
            assert (result.logprobs[i, n - p :] == 0).all()


def test_captured_log_probs_serve_as_old_ones_only_where_that_is_exact(
    make_roles: Callable, tokenizer: PreTrainedTokenizerFast
) -> None:
    def captured(dtype: torch.dtype, capture: str, name: str = "native") -> tuple[bool, bool]:
        roles = make_roles()
        roles.compute_dtype = dtype
        settings = GenerationSettings(max_new_tokens=2, capture_logprobs=capture)
        known = generate(make_engine(settings, tokenizer, roles), roles, max_new_tokens=2).logprobs is not None
        return known, use_captured_logprobs(replace(settings, engine=name), roles)

    assert captured(torch.float32, "auto") == (True, True)
    assert captured(torch.bfloat16, "auto") == (True, False)  # will be compared with scores computed again
    assert captured(torch.float32, "auto", "vllm") == (True, False)
    assert captured(torch.bfloat16, "always") == (True, True)
    assert captured(torch.float32, "never") == (False, False)


def test_on_a_gpu_captured_log_probs_are_exact_without_tf32_only(
    make_roles: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TF32, log-probs captured while decoding are some 5e-3 nats from those of the update's shapes."""
    settings, roles, before = GenerationSettings(max_new_tokens=2), make_roles(), torch.get_float32_matmul_precision()

    def used(precision: str) -> bool:
        torch.set_float32_matmul_precision(precision)
        try:
            return use_captured_logprobs(settings, roles)
        finally:
            torch.set_float32_matmul_precision(before)

    assert [used("high"), used("highest")] == [True, True]  # a CPU computes in float32 with either
    monkeypatch.setattr(Roles, "device", torch.device("cuda"))
    assert [used("high"), used("highest")] == [False, True]
