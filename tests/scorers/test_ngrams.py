"""The sentiment classifiers that are trained here: what they learn from, and that two of them can be independent."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.data.imdb import Imdb
from rlhf.errors import ConfigError
from rlhf.scorers import Context
from rlhf.scorers.ngrams import NgramScorer
from tests.helpers.scorer_context import shared_roles
from tests.helpers.tiny_models import word_tokenizer

KIND = ["a wonderful film with a touching story", "brilliant acting and a lovely ending", "superb fun for the family"]
UNKIND = ["a dreadful film with a boring story", "wooden acting and an awful ending", "dull and a waste of time"]
SHARES = {"sft": 0.4, "prompts": 0.4, "eval": 0.2}


def reviews(folder: Path, label_of: Callable[[str, int], int] = lambda text, label: label) -> Context:
    """A context whose data set holds 120 kind and 120 unkind reviews."""
    with gzip.open(folder / "reviews.jsonl.gz", "wt") as file:
        for i in range(120):
            for label, texts in ((1, KIND), (0, UNKIND)):
                text = f"{texts[i % 3]} number {i}"
                file.write(json.dumps({"text": text, "label": label_of(text, label)}) + "\n")
    source = Imdb(root=str(folder), reviews="reviews.jsonl.gz", shares=SHARES)
    return Context(source, word_tokenizer(), shared_roles())


def test_it_tells_kind_reviews_from_unkind_ones(tmp_path: Path) -> None:
    context = reviews(tmp_path)
    scorer = NgramScorer(context)
    assert scorer.accuracy > 0.95
    scores = scorer.score(["a lovely and touching film", "a boring waste of time"])
    assert scores[0] > 1 > -1 > scores[1]
    repeated = scorer.score(["lovely", " ".join(["lovely"] * 10)])
    assert repeated[1] < 2 * repeated[0]
    assert torch.equal(NgramScorer(context).score(KIND + UNKIND), scorer.score(KIND + UNKIND))
    assert torch.equal(scorer.rate(["a lovely", "a boring"], [" film", " film"]),
                       scorer.score(["a lovely film", "a boring film"]))  # fmt: skip


def test_characters_know_parts_of_words(tmp_path: Path) -> None:
    """A misspelled word is nothing to a bag of words, and has most characters of the right one."""
    context, texts = reviews(tmp_path), ["wonderfull", "dreadfull"]
    words, characters = NgramScorer(context), NgramScorer(context, unit="char", ngrams=[3, 5])
    assert characters.accuracy > 0.95
    assert len(set(words.score(texts).tolist())) == 1
    scores = characters.score(texts)
    assert scores[0] > 0.5 > -0.5 > scores[1]


def test_each_learns_from_its_own_reviews_only(tmp_path: Path) -> None:
    """In the reviews of the split `prompts` all labels are reversed."""
    shares = reviews(tmp_path).source._shares  # type: ignore[attr-defined]
    context = reviews(tmp_path, lambda text, label: 1 - label if shares.split_of(text) == "prompts" else label)
    first, second = NgramScorer(context), NgramScorer(context, split="prompts")
    assert (first.score(KIND) > 0.5).all()
    assert (second.score(KIND) < -0.5).all()
    assert first.accuracy > 0.95 > 0.05 > second.accuracy  # the reviews of `eval` have the right labels


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"unit": "syllable"}, "unit=syllable of a classifier is not allowed; allowed: word, char, char_wb"),
        ({"split": "eval"}, "split=eval of a classifier is not allowed; allowed: sft, prompts"),
        ({"ngrams": [3, 1]}, r"ngrams=\[3, 1\] .* allowed: \[smallest, largest\]"),
        ({"ngrams": [0, 1]}, "from 1"),
        ({"ngrams": 2}, "ngrams=2"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NgramScorer.check(keys)
    NgramScorer.check({})
