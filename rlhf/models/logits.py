"""From hidden states to logits as the model itself goes: some models scale or cap what their output embedding gives.

Log-probs are computed from hidden states, chunk by chunk, so what a model does on that way has to be done here too. It
is the model's own code that does it, whatever that is.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ModelError

TRIED = 4  # tokens that a head is tried out on
LARGE = 300.0  # logits at which a cap shows: those of a new model are far below it
CLOSE = 1e-5  # how far logits may be apart that the same code made, of the largest


class LanguageHead(nn.Module):
    """The way from hidden states to logits through the model's own forward: output embedding, scale, cap and all.

    It runs on a shallow copy of the model in which the layers are replaced by the given states.
    """

    shell: Any
    output: Any

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        shell = copy.copy(model)
        vars(shell)["_modules"] = {**vars(model)["_modules"], model.base_model_prefix: _GivenStates(model.base_model)}
        # not as submodules, which would count the weights twice
        vars(self).update(shell=shell, output=model.get_output_embeddings())

    @property
    def weight(self) -> Tensor:
        """The output embedding [vocabulary, hidden]."""
        return self.output.weight

    def forward(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape vocabulary"]:
        """The model's own logits."""
        logits = self.shell(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)


class _GivenStates(nn.Module):
    """In the place of a model's layers, of which it has all attributes but what they compute."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        vars(self)["layers"] = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layers"], name)

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> "_States":
        return _States([inputs_embeds])


class _States(tuple):
    """What a model's head looks for in the output of its layers: the states, and nothing else."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_of(model: PreTrainedModel) -> nn.Module:
    """What makes logits of the model's last hidden states: its output embedding, if that is all, or its own way.

    Raises:
        ModelError: the model's logits are made of something else.
    """
    own = getattr(model, "_rlhf_own_logits", None)
    if own is None:
        own = makes_its_own(model)
        vars(model)["_rlhf_own_logits"] = own
    return LanguageHead(model) if own else model.get_output_embeddings()


@torch.no_grad()
def makes_its_own(model: PreTrainedModel) -> bool:
    """Whether the model's logits are more than its output embedding of its last hidden states, however large these are.

    Raises:
        ModelError: its own code makes other logits of these states than of a text.
    """
    output = model.get_output_embeddings()
    ids = torch.arange(TRIED, device=model.device)[None]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        states = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        expected = model(input_ids=ids, use_cache=False).logits
        if output is not None and states is not None:
            own = LanguageHead(model)
            if _same(own, states, expected):
                large = states * (LARGE / expected.abs().max().clamp(min=1e-3))
                return not _same(output, large, own(large))
            if _same(output, states, expected):
                return False
    finally:
        for module in was_training:
            module.training = True
    raise ModelError(
        f"{type(model).__name__} makes its logits of more than its last hidden states, so that log-probs would be of "
        "another distribution; allowed: a model with a language-model head on its layers"
    )


def _same(head: nn.Module, states: Tensor, expected: Tensor) -> bool:
    try:
        found = head(states).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # its forward wants more than states
        return False
    return found.shape == expected.shape and bool(
        (found - expected.float()).abs().max() <= CLOSE * expected.float().abs().max()
    )
