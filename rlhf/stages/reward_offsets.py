"""What explains a preference besides the score: the length of the answers, and how clear the preference was.

The reward model's loss is −log σ(r(chosen) − r(rejected) + offset).

With `reward.length_coef` α the offset has α (tokens of chosen − tokens of rejected): what annotators prefer about
length is explained by α, as in a regression with length as a second variable, and the score learns the rest. Park et
al. 2024 (arXiv 2403.19159) debias DPO's implicit reward so. With `reward.margin_coef` γ it has −γ · margin: the scores
have to be further apart where the preference was clearer (Touvron et al. 2023, arXiv 2307.09288, section 3.2.2).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq  # type: ignore[import-untyped]
from torch import Tensor

from rlhf.data.records import Comparison
from rlhf.errors import DataError
from rlhf.settings import RewardSettings
from rlhf.stages.cutting import Encoded
from rlhf.stages.pairs import Comparisons

Key = tuple[tuple[int, ...], tuple[int, ...]]  # the ids of chosen and rejected, each with its prompt
STEEPEST = 10.0  # nats per token that a fitted length coefficient may have: all longer answers are chosen


def key_of(chosen: Encoded, rejected: Encoded) -> Key:
    """What a pair is found by."""
    return (*chosen[0], *chosen[1]), (*rejected[0], *rejected[1])


def margins_of(rows: Sequence[Comparison], pairs: Sequence[tuple[Encoded, Encoded]]) -> dict[Key, float]:
    """The margins of those comparisons that have one, by their ids."""
    found = {}
    for row, pair in zip(rows, pairs, strict=True):
        margin = getattr(row, "margin", None)
        if margin is not None:
            found[key_of(*pair)] = float(margin)
    return found


def fit_length_coef(pairs: Sequence[tuple[Encoded, Encoded]]) -> float:
    """α of the logistic regression of the preferences on the difference in length alone, without an intercept.

    The root of Σ d σ(−α d), the derivative of the log-likelihood, which falls in α.

    Raises:
        DataError: all pairs are equally long.
    """
    differences = np.array([len(chosen[1]) - len(rejected[1]) for chosen, rejected in pairs], dtype=float)
    if not differences.any():
        raise DataError(
            "reward.length_coef=auto: both answers of every comparison are equally long; allowed: a number, or 0"
        )

    def slope(alpha: float) -> float:
        return float((differences / (1 + np.exp(np.clip(alpha * differences, -500, 500)))).sum())

    if slope(-STEEPEST) * slope(STEEPEST) >= 0:  # length alone decides every preference
        return STEEPEST if slope(STEEPEST) > 0 else -STEEPEST
    return float(brentq(slope, -STEEPEST, STEEPEST))


def offsets(
    settings: RewardSettings, length_coef: float, margins: Mapping[Key, float], batch: Comparisons
) -> Float[Tensor, "pairs"]:
    """The offset of each pair of a batch, on the host; a pair without a margin has none."""
    lengths = batch.texts.response_lengths[batch.sides]
    found = length_coef * (lengths[:, 0] - lengths[:, 1]).float()
    if settings.margin_coef:
        ends = batch.texts.lengths.tolist()
        texts = [tuple(ids[:end]) for ids, end in zip(batch.texts.ids.tolist(), ends, strict=True)]
        keys = [(texts[chosen], texts[rejected]) for chosen, rejected in batch.sides.tolist()]
        found = found - settings.margin_coef * torch.tensor([margins.get(key, 0.0) for key in keys])
    return found
