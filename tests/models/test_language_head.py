"""Models that scale or cap their logits after the output embedding: log-probs against plain transformers."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.divergence import exact_kl
from rlhf.errors import ModelError
from rlhf.models import heads
from rlhf.models.architecture import hidden_size_of
from rlhf.models.logits import LanguageHead, head_of
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.native import NativeEngine
from rlhf.stages.passes import exact_divergence
from tests.helpers.tiny_architectures import TRANSFORMED, tiny_architecture


@pytest.fixture(params=TRANSFORMED)
def transformed(request: pytest.FixtureRequest) -> PreTrainedModel:
    try:
        return tiny_architecture(request.param, **TRANSFORMED[request.param])
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])


def logprobs_of(logits: torch.Tensor, texts: Sequences) -> torch.Tensor:
    return logits[texts.predicting].log_softmax(-1).gather(-1, texts.target_ids[:, None]).squeeze(-1)


def test_logprobs_and_their_gradient_are_the_models_own(
    transformed: PreTrainedModel, make_texts: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed in chunks of a few tokens; the output embedding alone would give other values."""
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", 7 * 60)
    roles, texts = Roles(transformed), make_texts(4, seed=1)
    weight = transformed.get_input_embeddings().weight
    own = logprobs_of(transformed(texts.ids).logits, texts)
    (own_gradient,) = torch.autograd.grad(own.sum(), weight)
    found = roles.token_stats("reference", roles.states("reference", texts, texts.predicting), texts.target_ids)
    (gradient,) = torch.autograd.grad(found.logprobs.sum(), weight)
    torch.testing.assert_close(found.logprobs, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, own_gradient, rtol=1e-3, atol=1e-4 * float(own_gradient.abs().max()))
    bare = transformed.get_output_embeddings()(transformed.base_model(texts.ids).last_hidden_state)
    assert (logprobs_of(bare, texts) - own).abs().max() > 0.1


def test_exact_divergence_is_that_of_the_models_own_logits(make_texts: Callable) -> None:
    model, other = (tiny_architecture("gemma2", **TRANSFORMED["gemma2"]) for _ in range(2))
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    roles, texts = Roles(model), make_texts(3, seed=2)
    roles.add_trunk("policy", other)
    roles.table["policy"] = Role("policy", None)
    with torch.no_grad():
        states = [roles.states(role, texts, texts.predicting) for role in ("policy", "reference")]
        found = exact_divergence(roles, *states, 0.7, exact_kl)
        ours, theirs = ((m(texts.ids).logits[texts.predicting] / 0.7).log_softmax(-1) for m in (other, model))
    expected = (ours.exp() * (ours - theirs)).sum(-1)
    assert expected.max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2"])
def test_sampled_logprobs_are_the_models_own(kind: str) -> None:
    model, prompts = tiny_architecture(kind, **TRANSFORMED[kind]), [[5, 9, 7], [3, 4, 5, 6, 7, 8, 9]]
    request = GenerationRequest(prompts, 12, 1.0, torch.Generator().manual_seed(0))
    generated = NativeEngine(1).generate(Roles(model), "reference", request)
    for row, prompt in enumerate(prompts):
        response = generated.ids[row, : generated.lengths[row]].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
        torch.testing.assert_close(generated.logprobs[row, : len(response)], expected, rtol=1e-4, atol=1e-4)


def test_a_plain_head_is_used_as_it_is(make_model: Callable) -> None:
    for kind in ("llama", "tied", "neox"):
        model = make_model(kind)
        assert head_of(model) is model.get_output_embeddings()
    assert isinstance(head_of(tiny_architecture("granite", logits_scaling=2.0)), LanguageHead)


def test_a_cap_is_found_where_logits_are_far_below_it() -> None:
    """A cap on the logits of a new model changes them by less than rounding, until they have grown."""
    model = tiny_architecture("gemma2", **TRANSFORMED["gemma2"] | {"final_logit_softcapping": 30.0})
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e-3)
    assert isinstance(head_of(model), LanguageHead)


def test_a_head_adds_no_parameter() -> None:
    model = tiny_architecture("granite", logits_scaling=8.0)
    assert sum(p.numel() for p in Roles(model).parameters()) == sum(p.numel() for p in model.parameters())


def test_logits_that_come_from_elsewhere_are_refused() -> None:
    model = tiny_architecture("llama")
    plain = type(model).forward

    class Strange(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor | None = None, **options: object) -> object:
            if input_ids is None:
                raise ValueError("ids are needed")
            found = plain(self, input_ids=input_ids, **options)
            found.logits = found.logits + input_ids[..., None]
            found.logits[..., 0] = 0
            return found

    model.__class__ = Strange
    with pytest.raises(ModelError, match=r"^Strange computes its logits from more than its last hidden states, "):
        head_of(model)


def test_logprobs_agree_for_states_narrower_than_the_layers(make_texts: Callable) -> None:
    """Hidden states wider than the embeddings, as in OPT-350M, where they are twice as wide."""
    options = {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    roles, texts = Roles(tiny_architecture("opt", **options)), make_texts(3, seed=1)
    assert hidden_size_of(roles.trunk("reference")) == roles.hidden_size == 16
    roles.add_head("reference", zero=False)
    assert roles.last_token_scores("reference", texts).shape == (3,)
