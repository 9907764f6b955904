"""The classifier scorer against transformers' own pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.farm import Farm
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, ModelError
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import Context
from rlhf.scorers.classifier import ClassifierScorer
from tests.helpers.chat_models import KINDS, chat_tokenizer, save_chat_model, save_chat_tokenizer
from tests.helpers.scorer_context import NoSource

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


# -- conversations -----------------------------------------------------------------------------------------------------

TALK = [
    {"role": "user", "content": "Name a tea."},
    {"role": "assistant", "content": "Sencha."},
    {"role": "user", "content": "Another?"},
]
PLAIN = Template("{instruction} {input}", "Q: {instruction}\nA:")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as on the Hub: a decoder with one output and a chat template, which ends in a line break."""
    folder = tmp_path_factory.mktemp("reward")
    save_chat_model("chatml", folder)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    return folder


def _alone(folder: Path, talk: list[dict[str, str]]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(talk, return_tensors="pt")["input_ids"]
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return float(model(input_ids=ids).logits.detach())


@pytest.mark.parametrize("policy", ["headers", "strings", "none"])
def test_a_hub_reward_model_reads_conversations_in_its_own_template(
    reward_model: Path, policy: str, tmp_path: Path
) -> None:
    own = ChatTemplate(str(save_chat_tokenizer("headers", tmp_path)))
    template = {"headers": own, "strings": PLAIN, "none": None}[policy]
    talk = TALK if policy == "headers" else TALK[:1]
    prompt = template.render_messages(talk) if template else TALK[0]["content"]
    ClassifierScorer.check({"model": str(reward_model), "label": None})
    scorer = ClassifierScorer(replace(CONTEXT, source=NoSource(template)), str(reward_model), label=None)
    answers = ["Assam.", "Green tea, of course"]
    expected = [_alone(reward_model, [*talk, {"role": "assistant", "content": answer}]) for answer in answers]
    assert scorer.rate([prompt] * 2, answers).tolist() == pytest.approx(expected, abs=1e-4)


def test_without_a_template_or_by_request_prompt_and_response_are_one_text(reward_model: Path) -> None:
    scorer = ClassifierScorer(CONTEXT, str(reward_model), label=None, template="none")
    assert scorer.rate(["Name "], ["tea."]).tolist() == scorer.score(["Name tea."]).tolist()
    assert scorer.chat is None


def test_prompts_that_cannot_be_read_back_are_refused(reward_model: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("headers")
    tokenizer.chat_template = KINDS["headers"][0].replace("| trim", "| upper")
    tokenizer.save_pretrained(tmp_path)
    odd = NoSource(ChatTemplate(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"cannot be read back.*allowed: none"):
        ClassifierScorer(replace(CONTEXT, source=odd), str(reward_model), label=None)
