"""Sampling from models with local or distance-dependent attention: log-probs are those of the model itself."""

import pytest
import torch

from rlhf.models.roles import Roles
from rlhf.models.unpadded import takes_visible
from rlhf.rollout import native
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.native import NativeEngine
from tests.helpers.tiny_architectures import LOCAL, tiny_architecture

SHORT, LONG = [7, 5, 3], [(7 * i) % 50 + 3 for i in range(17)]


def gap(roles: Roles, prompts: list[list[int]], row: int = 0, fixed: bool = False) -> float:
    """The largest difference between sampled log-probs and those of a forward pass over that row alone."""
    engine = NativeEngine(1, fixed=fixed)
    found = engine.generate(roles, "reference", GenerationRequest(prompts, 20, 1.0, torch.Generator().manual_seed(3)))
    response = found.ids[row, : found.lengths[row]].tolist()
    with torch.no_grad():
        logits = roles.trunk("reference")(torch.tensor([prompts[row] + response]), use_cache=False).logits[0]
    expected = logits[len(prompts[row]) - 1 : -1].log_softmax(-1)[torch.arange(len(response)), response]
    assert found.logprobs is not None
    return float((found.logprobs[row, : len(response)] - expected).abs().max())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", LOCAL)
def test_sampled_logprobs_do_not_depend_on_the_batch(kind: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences longer than the window, with prompts of different lengths and rows that are dropped as they end."""
    monkeypatch.setattr(native, "CHECK_EVERY", 1)
    roles = Roles(tiny_architecture(kind, **LOCAL[kind]))
    for prompts, row in (([SHORT], 0), ([SHORT, LONG], 0), ([SHORT, LONG, [9]], 1), ([LONG, [9]], 1)):
        assert gap(roles, prompts, row, fixed) < 1e-4


def test_a_window_that_reaches_further_than_the_text_changes_nothing() -> None:
    """Models with windows of thousands of tokens are decoded like models without windows."""
    assert takes_visible(tiny_architecture("mistral", sliding_window=None), 50)
    for kind in ("mistral", "gemma3_text"):
        model = tiny_architecture(kind, **LOCAL[kind] | {"sliding_window": 50})
        assert takes_visible(model, 50)
        assert not takes_visible(model, 51)
    assert not takes_visible(tiny_architecture("bloom", **LOCAL["bloom"]), 5)
    assert not takes_visible(tiny_architecture("falcon", **LOCAL["falcon"]), 5)
