"""The trial of a model before training: unsuitable models are refused in one sentence."""

from collections.abc import Callable

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models.roles import Roles
from rlhf.rollout.trial import try_out
from tests.helpers.tiny_architectures import LOCAL, STATEFUL, TRANSFORMED, tiny_architecture

LEAKING = {"bloom": LOCAL["bloom"], "mpt": LOCAL["mpt"], "gpt_oss": LOCAL["gpt_oss"], **STATEFUL}
XGLM = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", *sorted(TRANSFORMED.keys() - STATEFUL.keys()), *LOCAL])
def test_a_suitable_model_passes_unchanged(kind: str) -> None:
    roles = Roles(tiny_architecture(kind, **LOCAL.get(kind) or TRANSFORMED.get(kind, {})))
    roles.train()
    before = torch.random.get_rng_state()
    for engine in ("native", "transformers", "vllm", ""):
        try_out(roles, "reference", engine)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in roles.modules())


@pytest.mark.parametrize("kind", [*LEAKING, "xglm"])
def test_packing_that_leaks_is_refused(kind: str) -> None:
    roles = Roles(tiny_architecture(kind, **LEAKING.get(kind, XGLM)))
    try_out(roles, "reference")
    with pytest.raises(
        ModelError, match=r"^sft\.packing=true does not keep texts apart in \w+ \(.*nats .*\); allowed: "
    ):
        try_out(roles, "reference", packing=True)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_state_that_takes_in_padding_is_refused(kind: str) -> None:
    with pytest.raises(ModelError, match=r"^generation\.engine=native cannot sample from \w+ \(.*\); allowed: "):
        try_out(Roles(tiny_architecture(kind, **STATEFUL[kind])), "reference", "native")


def test_packing_that_keeps_texts_apart_passes(make_roles: Callable) -> None:
    for kind in ("llama", "tied", "neox"):
        try_out(make_roles(kind), "policy", "native", packing=True)
