"""A sentiment classifier of our own, for reviews where no hub can be reached: TF-IDF and logistic regression."""

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context

log = logging.getLogger(__name__)


class BagOfWordsScorer:
    """Log-odds of "positive" for prompt and response together, by words and pairs of words.

    Trained when the run starts, on the labelled reviews of the data set's `sft` split (the same reviews give the same
    classifier), and tested on those of its `eval` split, of which neither the model nor the classifier saw anything.
    """

    needs_reward_model: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __init__(self, context: Context, regularization: float = 10.0, min_reviews: int = 3):
        # word counts are damped and each text has unit length, so that saying "great" ten times is worth little more
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=min_reviews, sublinear_tf=True, strip_accents="unicode")
        self.model = make_pipeline(vectorizer, LogisticRegression(C=regularization, max_iter=1000))
        train, test = (context.source.labelled(split) for split in ("sft", "eval"))  # type: ignore[attr-defined]
        self.model.fit(train["text"], train["label"])
        self.accuracy = float(self.model.score(test["text"], test["label"]))
        log.info("the sentiment classifier is right on %.1f %% of %d held-out reviews", 100 * self.accuracy, len(test))

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """Scores of rollouts."""
        texts = [prompt + response for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)]
        return self.score(texts).to(rollouts.sequences.ids.device)

    def score(self, texts: Sequence[str]) -> Float[Tensor, "batch"]:
        """Log-odds of "positive", in nats."""
        return torch.as_tensor(self.model.decision_function(texts), dtype=torch.float32)
