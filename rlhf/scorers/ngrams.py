"""A sentiment classifier for reviews, trained here (TF-IDF, logistic regression): needs no download from the Hub."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor

from rlhf.data.records import Split
from rlhf.errors import ConfigError
from rlhf.scorers import Context, TextScorer, joined

log = logging.getLogger(__name__)

UNITS = ("word", "char", "char_wb")
SPLITS = ("sft", "prompts")


class NgramScorer(TextScorer):
    """Scores the log-odds of "positive", from the n-grams of prompt and response together.

    The classifier is trained when the run starts, on the labelled reviews of the data set's split `split`. Training is
    deterministic. Its accuracy is measured on the `eval` split, which neither the policy nor the classifier was trained
    on. Two classifiers that share neither reviews nor features, such as words of one half and characters of the other,
    make a reward and a gold score that is not trained on.

    `unit` is scikit-learn's analyzer: n-grams of words, of characters, or of characters within a word. `ngrams` holds
    the smallest and the largest n. `regularization` is scikit-learn's inverse strength C. N-grams in fewer than
    `min_reviews` reviews are ignored.
    """

    needs_labels: ClassVar[bool] = True

    def __init__(
        self,
        context: Context,
        unit: str = "word",
        ngrams: Sequence[int] = (1, 2),
        split: Split = "sft",
        regularization: float = 10.0,
        min_reviews: int = 3,
    ):
        # Logarithmic counts and unit-length texts: repeating "great" ten times is worth little more than once.
        vectorizer = TfidfVectorizer(
            analyzer=unit,
            ngram_range=tuple(ngrams),
            min_df=min_reviews,
            sublinear_tf=True,
            strip_accents="unicode",
        )
        self.model = make_pipeline(vectorizer, LogisticRegression(C=regularization, max_iter=1000))
        train, test = (context.source.labelled(name) for name in (split, "eval"))  # type: ignore[attr-defined]
        self.model.fit(train["text"], train["label"])
        self.accuracy = float(self.model.score(test["text"], test["label"]))
        log.info(
            "the sentiment classifier (%s n-grams, split %s) has accuracy %.1f %% on %d held-out reviews",
            unit, split, 100 * self.accuracy, len(test),
        )  # fmt: skip

    @classmethod
    def check(cls, chosen: Mapping[str, Any]) -> None:
        """Check the keys of the YAML file.

        Raises:
            ConfigError: a value is not allowed.
        """
        for key, allowed in {"unit": UNITS, "split": SPLITS}.items():
            if chosen.get(key, allowed[0]) not in allowed:
                raise ConfigError(f"{key}={chosen[key]} of a classifier is not allowed; allowed: {', '.join(allowed)}")
        bounds = chosen.get("ngrams", [1, 2])
        whole = isinstance(bounds, list) and [type(bound) for bound in bounds] == [int, int]
        if not whole or not 1 <= bounds[0] <= bounds[1]:
            raise ConfigError(f"ngrams={bounds} of a classifier is not allowed; allowed: [smallest, largest] from 1")

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The log-odds of "positive" of prompt and response together, in nats."""
        return self.score(joined(prompts, responses))

    def score(self, texts: Sequence[str]) -> Float[Tensor, "batch"]:
        """The log-odds of "positive" of each text, in nats."""
        return torch.as_tensor(self.model.decision_function(texts), dtype=torch.float32)
