"""A sentiment classifier for reviews, trained here (TF-IDF, logistic regression): needs no download from the Hub."""

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
    """Scores the log-odds of "positive", from the words and word pairs of prompt and response together.

    The classifier is trained when the run starts, on the labelled reviews of the data set's `sft` split. Training is
    deterministic. Its accuracy is measured on the `eval` split, which neither the policy nor the classifier was trained
    on.

    `regularization` is scikit-learn's inverse strength C. Words and pairs in fewer than `min_reviews` reviews are
    ignored.
    """

    needs_reward_model: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def __init__(self, context: Context, regularization: float = 10.0, min_reviews: int = 3):
        # Logarithmic counts and unit-length texts: repeating "great" ten times is worth little more than once.
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=min_reviews, sublinear_tf=True, strip_accents="unicode")
        self.model = make_pipeline(vectorizer, LogisticRegression(C=regularization, max_iter=1000))
        train, test = (context.source.labelled(split) for split in ("sft", "eval"))  # type: ignore[attr-defined]
        self.model.fit(train["text"], train["label"])
        self.accuracy = float(self.model.score(test["text"], test["label"]))
        log.info("the sentiment classifier has accuracy %.1f %% on %d held-out reviews", 100 * self.accuracy, len(test))

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "batch"]:
        """The score of each rollout, in nats."""
        texts = [prompt + response for prompt, response in zip(rollouts.prompts, rollouts.responses, strict=True)]
        return self.score(texts).to(rollouts.ended.device)

    def score(self, texts: Sequence[str]) -> Float[Tensor, "batch"]:
        """The log-odds of "positive" of each text, in nats."""
        return torch.as_tensor(self.model.decision_function(texts), dtype=torch.float32)
