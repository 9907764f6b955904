"""From last hidden states to logits, by the model's own code.

Log-probs are computed from hidden states, chunk by chunk (`rlhf.models.heads`). Some models do more on the way to the
logits than apply the output embedding: they scale or cap them. `head_of` finds out and then runs the model's own code.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.errors import ModelError
from rlhf.models.blocks import evaluating

TRIED = 4  # tokens in the comparison of a head with the model
LARGE = 300.0  # size of logits at which a cap shows: those of a new model are far below any cap
CLOSE = 1e-5  # largest difference of logits that count as equal, relative to the largest logit


class LanguageHead(nn.Module):
    """Maps hidden states to logits with the model's own `forward`, including any scale or cap.

    Runs a shallow copy of the model whose base model is replaced by a module that returns the given hidden states.
    """

    shell: Any
    output: Any

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        shell = copy.copy(model)
        vars(shell)["_modules"] = {**vars(model)["_modules"], model.base_model_prefix: _GivenStates(model.base_model)}
        # Bypass nn.Module.__setattr__: as submodules, the weights would be counted twice.
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
    """Stands in for a base model: has all its attributes, but returns the given hidden states."""

    def __init__(self, layers: nn.Module):
        super().__init__()
        vars(self)["layers"] = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layers"], name)

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> "_States":
        return _States([inputs_embeds])


class _States(tuple):
    """A base model's output that holds hidden states only; all other fields are None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_of(model: PreTrainedModel) -> nn.Module:
    """The module that maps last hidden states to logits: the output embedding, or a `LanguageHead` if there is more.

    The comparison runs once per model; its result is stored on the model.

    Raises:
        ModelError: the model's logits depend on more than its last hidden states.
    """
    own = getattr(model, "_rlhf_own_logits", None)
    if own is None:
        own = transforms_logits(model)
        vars(model)["_rlhf_own_logits"] = own
    return LanguageHead(model) if own else model.get_output_embeddings()


@torch.no_grad()
def transforms_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits differ from its output embedding of the last hidden states, at any size of these.

    Raises:
        ModelError: the logits cannot be computed from the last hidden states, by neither of the two ways.
    """
    output = model.get_output_embeddings()
    ids = torch.arange(TRIED, device=model.device)[None]
    with evaluating(model):
        states = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
        expected = model(input_ids=ids, use_cache=False).logits
        if output is not None and states is not None:
            own = LanguageHead(model)
            if _same(own, states, expected):
                # Compare again where a cap would show.
                large = states * (LARGE / expected.abs().max().clamp(min=1e-3))
                return not _same(output, large, own(large))
            if _same(output, states, expected):
                return False
    raise ModelError(
        f"{type(model).__name__} computes its logits from more than its last hidden states, so log-probs would be "
        "those of another distribution; allowed: a model with a language-model head on its layers"
    )


def _same(head: nn.Module, states: Tensor, expected: Tensor) -> bool:
    """Whether a head computes the expected logits from these hidden states."""
    try:
        found = head(states).float()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # the model's forward needs more than hidden states
    return found.shape == expected.shape and bool(
        (found - expected.float()).abs().max() <= CLOSE * expected.float().abs().max()
    )
