"""A Hugging Face text classifier as scorer, with its own tokenizer, as in TRL + PEFT's IMDB example (2023).

It may be a sentiment classifier or a reward model from the Hub, which is a classifier with a single output. A reward
model that was trained on conversations reads them in its own chat template.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.templates import PromptTemplate, conversation_of
from rlhf.errors import ConfigError, ModelError, RowError, explained
from rlhf.models.architecture import max_positions
from rlhf.models.loading import load_whole
from rlhf.models.tokenizing import encode, keep_template, last_tokens
from rlhf.scorers import Context, TextScorer, joined


class ClassifierScorer(TextScorer):
    """The classifier's logit of `label` for the text of prompt and response, tokenised by its own tokenizer.

    `label=None` is for models with a single output, such as reward models on the Hub. `output="log_odds"` gives
    log p − log(1 − p) instead of the logit, which does not change if a constant is added to all logits. Texts are cut
    to `max_length` tokens. The classifier is on the policy's device, in float32, without gradients.

    If its tokenizer has a chat template, the classifier reads the policy's prompt and response as a conversation in
    that template, whatever the policy's own is; too long ones lose their beginning. `template` names another one (a
    .jinja file, or a tokenizer that has one), and with `template="none"` the classifier reads the two texts as one.

    Raises:
        ConfigError: `output` is neither "logit" nor "log_odds", or it is "log_odds" with a single label; or the
            policy's prompts cannot be read back as conversations.
        ModelError: no classifier can be loaded from `model`, or it has no such label.
    """

    def __init__(
        self,
        context: Context,
        model: str,
        label: str | None = "POSITIVE",
        output: str = "logit",
        max_length: int = 512,
        batch_size: int = 32,
        template: str = "auto",
    ):
        with explained(f"scorer.model={model}: no text classifier could be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        classifier = load_whole(AutoModelForSequenceClassification, model, "text classifier")
        self.model = classifier.eval().to(context.roles.device)
        self.index, self.output = _label_index(model, self.model.config, label, output), output
        self.max_length, self.batch_size = max_length, batch_size
        self.asked: PromptTemplate | None = getattr(context.source, "template", None)
        self.chat = _chat_template(model, self.tokenizer, template)
        if self.chat:
            keep_template(self.tokenizer, SimpleNamespace(template=self.chat))
            _check_readable(self.asked)

    @classmethod
    def check(cls, chosen: Mapping[str, Any]) -> None:
        """Check the keys of the YAML file against the classifier's configuration and tokenizer, without its weights.

        Nothing is checked if the Hub cannot be reached now.

        Raises:
            ConfigError: a value is not allowed for this classifier.
            ModelError: there is no such classifier, it has no such label, or its tokenizer cannot pad.
        """
        model, longest = str(chosen["model"]), chosen.get("max_length", 512)
        with explained(f"scorer.model={model}: no text classifier could be loaded"):
            try:
                config = AutoConfig.from_pretrained(model)
                tokenizer = AutoTokenizer.from_pretrained(model)
            except OSError:
                if Path(model).is_dir():
                    raise
                return  # a model of the Hub, which may be reachable later
            with torch.device("meta"):
                classifier = AutoModelForSequenceClassification.from_config(config)
        _label_index(model, config, chosen.get("label", "POSITIVE"), chosen.get("output", "logit"))
        chat = _chat_template(model, tokenizer, str(chosen.get("template", "auto")))
        if chat:
            chat.check()
        limit = max_positions(classifier)
        if limit is not None and longest > limit:
            raise ConfigError(f"scorer.max_length={longest}: {model} has {limit} positions; allowed: up to {limit}")
        if not hasattr(classifier, "score") and tokenizer.pad_token_id is None:
            raise ModelError(
                f"scorer.model={model}: its tokenizer has no pad token, which {type(classifier).__name__} needs; "
                "allowed: a classifier whose tokenizer has one"
            )

    def rate(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each prompt and response, as one text or as a conversation in the classifier's template."""
        if self.chat is None:
            return self.score(joined(prompts, responses))
        return self.score([self._conversation(*pair) for pair in zip(prompts, responses, strict=True)])

    def _conversation(self, prompt: str, response: str) -> str:
        assert self.chat is not None
        answer = {"role": "assistant", "content": response}
        try:
            return self.chat.conversation([*conversation_of(prompt, self.asked), answer])
        except RowError as error:
            raise ConfigError(
                f"scorer.template: {error}; allowed: none, which scores prompt and response as one text"
            ) from None

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> Float[Tensor, "batch"]:
        """The score of each text, in the given order. With a chat template, texts are rendered conversations."""
        # Batches of texts of similar length contain little padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = torch.zeros(len(texts), device=self.model.device)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            logits = self._logits([texts[i] for i in rows])
            if self.output == "log_odds":
                others = logits.clone()
                others[:, self.index] = -torch.inf
                chosen = logits[:, self.index] - others.logsumexp(-1)
            else:
                chosen = logits[:, self.index]
            scores[rows] = chosen
        return scores

    def _logits(self, texts: Sequence[str]) -> Float[Tensor, "batch labels"]:
        """The classifier's logits, independent of which other texts are in the batch.

        A decoder computes its output at the last token that is not `config.pad_token_id`. Many published reward models
        have no pad token, or one that also ends texts: the output would be computed at the wrong token. Therefore rows
        are padded with an id that occurs in none of the texts, on the right, where causal attention hides it.
        """
        encoded = self._encoded(texts)
        if not hasattr(self.model, "score"):  # an encoder, which has an attention mask and its own pad token
            batch = self.tokenizer.pad(encoded, return_tensors="pt")
            return self.model(**batch.to(self.model.device)).logits.float()
        rows = [torch.tensor(ids) for ids in encoded["input_ids"]]
        used = {int(i) for row in rows for i in row.unique()}
        pad = next(i for i in range(len(used) + 1) if i not in used)
        self.model.config.get_text_config().pad_token_id = self.model.config.pad_token_id = pad
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = self.model.device
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()

    def _encoded(self, texts: Sequence[str]) -> BatchEncoding:
        if self.chat is None:
            return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        rows = encode(self.tokenizer, texts)
        return BatchEncoding({"input_ids": [last_tokens(self.tokenizer, row, self.max_length) for row in rows]})


def _chat_template(model: str, tokenizer: PreTrainedTokenizerBase, template: str) -> ChatTemplate | None:
    """The template in which a classifier reads conversations; None if it reads plain text."""
    if template == "none" or (template == "auto" and not tokenizer.chat_template):
        return None
    return ChatTemplate(model, chat_template=None if template == "auto" else template)


def _check_readable(template: PromptTemplate | None) -> None:
    """Prompts must be readable as conversations, if they are in a template."""
    if template and template.messages_of(template.render("a")) != [{"role": "user", "content": "a"}]:
        raise ConfigError(
            "scorer.template: the policy's prompts cannot be read back from data.template as conversations, which this "
            "classifier's chat template needs; allowed: none, which scores prompt and response as one text"
        )


def _label_index(model: str, config: PreTrainedConfig, label: str | None, output: str) -> int:
    """The index of the label's logit; letter case is ignored. `label=None` is allowed if there is only one."""
    if output not in ("logit", "log_odds"):
        raise ConfigError(f"scorer.output={output} is not allowed; allowed: logit or log_odds")
    labels: dict[str | None, int] = {str(name).lower(): index for index, name in config.id2label.items()}
    if len(labels) == 1:
        labels[None] = 0
    name = None if label is None else label.lower()
    if name not in labels:
        raise ModelError(f"scorer.label={label}: {model} has no such label; allowed: {', '.join(map(str, labels))}")
    if config.num_labels == 1 and output == "log_odds":
        raise ConfigError(f"scorer.output=log_odds needs two labels, and {model} has one; allowed: logit")
    return labels[name]
