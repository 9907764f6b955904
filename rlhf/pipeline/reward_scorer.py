"""A reward model that is no role beside the policy, as a scorer of texts."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rlhf.errors import explained
from rlhf.models.assembly import reward_alone
from rlhf.models.tokenizing import keep_template
from rlhf.pipeline.taken import CLASSIFIER
from rlhf.scorers import Context, TextScorer
from rlhf.scorers.classifier import ClassifierScorer
from rlhf.scorers.separate import SeparateRewardModel
from rlhf.settings import ModelSettings


def reward_scorer(
    context: Context,
    folder: Path,
    reads: str,
    max_length: int,
    model: ModelSettings,
    base: Path | None = None,
    quantization: dict[str, Any] | None = None,
) -> TextScorer:
    """The reward model of a folder, on the device of the policy.

    Args:
        context: of the run.
        folder: the reward model's.
        reads: `classifier`, anybody's classifier with one output; else one of ours, which reads its own ids.
        max_length: tokens of prompt and response.
        model: in which dtype a model of ours is loaded, and whether it may bring code.
        base: the folder of the model that it is an adapter on.
        quantization: how that base is stored.
    """
    if reads == CLASSIFIER:
        return ClassifierScorer(context, str(folder), label=None, max_length=max_length)
    with explained(f"{folder}: no tokenizer could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    roles = reward_alone(model, tokenizer, folder, base, quantization).to(context.roles.device)
    return SeparateRewardModel(context, roles, keep_template(tokenizer, context.source), max_length)
