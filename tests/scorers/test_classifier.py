"""The classifier scorer against transformers' own pipeline."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf.data.farm import Farm
from rlhf.errors import ConfigError, ModelError
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context
from rlhf.scorers.classifier import ClassifierScorer

FARM = Farm()
LLAMA = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
CONTEXT = Context(FARM, FARM.tokenizer(), Roles(LlamaForCausalLM(LLAMA)))
TEXTS = ["Introduce Lilo Kunn.", "He keeps bees and grows oats.", "She", "The baker is a baker of the baker and."]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer: PreTrainedTokenizerFast = Farm().tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"}, pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_logits_are_the_pipelines(classifier: Path) -> None:
    scorer = ClassifierScorer(CONTEXT, str(classifier), batch_size=2)
    pipe = pipeline("text-classification", str(classifier), function_to_apply="none", top_k=None)
    expected = [next(row["score"] for row in rows if row["label"] == "POSITIVE") for rows in pipe(TEXTS)]
    assert scorer.score(TEXTS).tolist() == pytest.approx(expected, abs=1e-4)


def test_log_odds_are_the_logit_of_the_probability(classifier: Path) -> None:
    scorer = ClassifierScorer(CONTEXT, str(classifier), output="log_odds")
    pipe = pipeline("text-classification", str(classifier), top_k=None)
    p = torch.tensor([next(row["score"] for row in rows if row["label"] == "POSITIVE") for rows in pipe(TEXTS)])
    torch.testing.assert_close(scorer.score(TEXTS), p.logit(), rtol=1e-3, atol=1e-3)


def test_prompt_and_response_are_read_together(classifier: Path) -> None:
    scorer = ClassifierScorer(CONTEXT, str(classifier), label="negative")
    rollouts = Rollouts(
        Sequences.from_lists([[1]], [[2]]), None, torch.ones(1, dtype=torch.bool), ["Introduce "], ["Lilo Kunn."]
    )
    assert scorer(rollouts).tolist() == pytest.approx(scorer.score(["Introduce Lilo Kunn."]).tolist())


def test_mistakes_are_sentences(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such label; allowed: negative, positive"):
        ClassifierScorer(CONTEXT, str(classifier), label="joy")
    with pytest.raises(ModelError, match="no text classifier"):
        ClassifierScorer(CONTEXT, str(tmp_path))
    with pytest.raises(ConfigError, match="logit or log_odds"):
        ClassifierScorer(CONTEXT, str(classifier), output="rank")
