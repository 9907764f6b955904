"""From hidden states to logits as the model itself goes: some models scale or cap what their output embedding gives.

Log-probs are computed from hidden states, chunk by chunk, so what a model does to its logits afterwards has to be done
here too. Which transform that is its configuration says, and the model's own logits prove it.
"""

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models import ModelError

TRIED = 4  # tokens that the transform is tried out on
CLOSE, CLOSE_IN_16_BITS = 1e-4, 3e-2  # how far logits may be off, of the largest


class Transform(NamedTuple):
    """logits = cap · tanh(scale · (output embedding · hidden) / cap); without a cap, scale · (…)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The model's logits; differentiable, and what it was given where there is nothing to do."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class Logits(nn.Module):
    """A language-model head and what the model does to its logits; `weight` is the head's."""

    def __init__(self, output: nn.Module, transform: Transform):
        super().__init__()
        self.output, self.transform = output, transform

    @property
    def weight(self) -> Tensor:
        """The output embedding [vocabulary, hidden]."""
        weight = self.output.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape vocabulary"]:
        """Logits in the dtype of the head."""
        return self.transform(self.output(hidden))


def head_of(model: PreTrainedModel) -> nn.Module:
    """What makes logits of the model's last hidden states: its output embedding, with its transform if it has one.

    Raises:
        ModelError: the model makes its logits otherwise.
    """
    transform = getattr(model, "_rlhf_transform", None)
    if transform is None:
        transform = transform_of(model)
        vars(model)["_rlhf_transform"] = transform
    output = model.get_output_embeddings()
    return output if transform == Transform() else Logits(output, transform)


@torch.no_grad()
def transform_of(model: PreTrainedModel) -> Transform:
    """The transform under which output embedding and last hidden states give the model's own logits.

    Raises:
        ModelError: none that is known does.
    """
    output = model.get_output_embeddings()
    ids = torch.arange(TRIED, device=model.device)[None]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        hidden, expected = _last_hidden(model, ids), model(input_ids=ids, use_cache=False).logits.float()
    finally:
        for module in was_training:
            module.training = True
    raw = None if output is None or hidden is None else output(hidden.to(output.weight.dtype)).float()
    if raw is not None and raw.shape == expected.shape:
        room = (CLOSE if output.weight.dtype.itemsize > 2 else CLOSE_IN_16_BITS) * expected.abs().max()
        for scale, cap in itertools.product(*_candidates(model)):
            transform = Transform(scale, cap)
            if bool((transform(raw) - expected).abs().max() <= room):
                return transform
    raise ModelError(
        f"{type(model).__name__} makes its logits in a way of its own from its last hidden states, so that log-probs "
        "would be those of another distribution; allowed: models whose logits are an output embedding times the last "
        "hidden state, scaled or capped as in Cohere, Granite or Gemma 2"
    )


def _last_hidden(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"]) -> Tensor | None:
    states = model.base_model(input_ids=ids, use_cache=False)
    return getattr(states, "last_hidden_state", None)


def _candidates(model: PreTrainedModel) -> tuple[list[float], list[float | None]]:
    """Scales and caps that the configuration may mean; those of no effect first."""
    config = model.config.get_text_config()

    def number(key: str) -> float | None:
        value = getattr(config, key, None)
        return float(value) if isinstance(value, int | float) and value else None

    multiplied = [number(key) for key in ("logit_scale", "lm_head_multiplier", "output_multiplier_scale")]
    divided = number("logits_scaling")
    base, width = number("dim_model_base"), number("hidden_size")  # MiniCPM's
    scales = [1.0, *filter(None, multiplied)]
    scales += [1 / divided] if divided else []
    scales += [base / width] if base and width else []
    return scales, [
        None,
        *filter(None, map(number, ("final_logit_softcapping", "logits_soft_cap"))),
    ]
