"""How much several answers to one prompt differ."""

import statistics
from collections.abc import Hashable, Sequence

from rlhf.evaluation.repetition import distinct_ngrams

Words = Sequence[Hashable]


def expectation_adjusted_distinct(answers: Sequence[Words], vocabulary: int) -> float:
    """Different tokens among all answers, over how many a uniform draw of as many tokens would be expected to have.

    N / (V (1 − ((V − 1) / V)^C), with N different ones of C tokens and V possible ones: unlike distinct-n it does not
    fall with the length of the answers (EAD: Liu et al. 2022, "Rethinking and refining the distinct metric"). 0 if
    there are no tokens.
    """
    tokens = [token for answer in answers for token in answer]
    if not tokens:
        return 0.0
    return len(set(tokens)) / (vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** len(tokens)))


def diversity(prompts: Sequence[Sequence[Words]], vocabulary: int) -> dict[str, float]:
    """Metrics of the answers to each prompt, as means over prompts.

    Args:
        prompts: for each prompt its answers, each as tokens.
        vocabulary: how many different tokens there are.
    """
    return {
        "eval/samples_distinct_1": statistics.fmean(distinct_ngrams(answers, 1) for answers in prompts),
        "eval/samples_distinct_2": statistics.fmean(distinct_ngrams(answers, 2) for answers in prompts),
        "eval/samples_ead": statistics.fmean(expectation_adjusted_distinct(a, vocabulary) for a in prompts),
        "eval/samples_unlike": statistics.fmean(len(set(map(tuple, a))) / len(a) for a in prompts),
    }
