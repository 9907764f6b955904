"""A released checkpoint, or another run's model, as a product of the cache: what `sft.from` and `reward.from` name."""

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.data.records import first_records, train_and_held_out
from rlhf.distributed import collectives
from rlhf.errors import ModelError
from rlhf.files import MODEL
from rlhf.models.assembly import reward_alone
from rlhf.models.differences import Weights, recover
from rlhf.models.export import HEAD, save_model, save_tokenizer, saved_head
from rlhf.models.loading import DTYPES, config_of, load_causal_lm, load_tokenizer, load_whole, switch_off_dropout
from rlhf.models.merging import merged
from rlhf.models.released import Checkpoint
from rlhf.models.roles import Roles
from rlhf.models.tokenizing import keep_template
from rlhf.models.tokens import settle_tokens
from rlhf.pipeline import cache
from rlhf.pipeline.builders import Site
from rlhf.pipeline.taken import CLASSIFIER, IDS, TEXT, Taken
from rlhf.scorers import Context, TextScorer
from rlhf.scorers.classifier import ClassifierScorer
from rlhf.scorers.separate import SeparateRewardModel
from rlhf.settings import ModelSettings
from rlhf.stages.reward import RewardModeling, accuracy
from rlhf.tracking.summary import write_summary

log = logging.getLogger(__name__)


def build_taken(site: Site, folder: Path, taken: Taken, device: str) -> None:
    """Write the checkpoint into `folder` as if it had been trained here: `model/`, whole, in `model.dtype`.

    Of a reward model the mean score of demonstrations is measured, and its accuracy if the data set has comparisons.
    The first process does it for all.

    Raises:
        ModelError: it cannot be read, or weights are missing or of another shape.
    """
    collectives.on_rank_zero(lambda: _build(site, folder, taken, device))


def _build(site: Site, folder: Path, taken: Taken, device: str) -> None:
    started, checkpoint, model = time.monotonic(), taken.checkpoint, site.settings.model
    log.info("taking %s (%s)", checkpoint, cache.name_of(folder))
    tokenizer = load_tokenizer(model, site.source)
    if taken.difference_to or (taken.product == "reward" and checkpoint.alpaca_farm):
        try:
            found = _recover(taken, model, tokenizer, folder / MODEL)
        except ModelError:
            shutil.rmtree(folder / MODEL, ignore_errors=True)  # gigabytes that nobody would use
            raise
    elif taken.product == "sft":
        save_model(_language_model(checkpoint, model, tokenizer), tokenizer, folder / MODEL)
        found = {}
    else:
        _save_classifier(taken, model, tokenizer, folder / MODEL)
        found = {}
    metrics = _measured(site, folder / MODEL, taken, tokenizer, device) if taken.product == "reward" else {}
    taken_from = {"name": checkpoint.name, **taken.identity(None), **found}
    write_summary(folder, metrics, site.plain, started, stage=taken.product, reads=taken.reads, taken_from=taken_from)


def _language_model(
    checkpoint: Checkpoint, model: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The whole model, with an adapter merged in float32."""
    options = {"trust_remote_code": model.trust_remote_code, "dtype": torch.float32}
    if checkpoint.base:
        lm = merged(AutoModelForCausalLM, checkpoint.base.complete(), checkpoint.complete(), **options)
        switch_off_dropout(lm)
        return lm.to(DTYPES[model.dtype])
    own = replace(model, name_or_path=str(checkpoint.complete()), config=None, gguf_file=None)
    return load_causal_lm(own, tokenizer)


def _save_classifier(taken: Taken, model: ModelSettings, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A reward model as a whole sequence classifier: with the run's tokenizer as a role, else with its own."""
    checkpoint, kind = taken.checkpoint, AutoModelForSequenceClassification
    options = {"num_labels": 1, "trust_remote_code": model.trust_remote_code, "dtype": torch.float32}
    if checkpoint.base:
        classifier = merged(kind, checkpoint.base.complete(), checkpoint.complete(), **options)
    else:
        classifier = load_whole(kind, checkpoint.complete(), "reward model", **options)
    if taken.reads == CLASSIFIER:
        assert checkpoint.tokenizer is not None  # `taken_of` refuses it otherwise
        classifier.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        return
    own = tokenizer if taken.reads == IDS else checkpoint.tokenizer
    assert own is not None
    head = classifier.score.weight.detach().clone()
    if (checkpoint.folder / HEAD).exists() and not checkpoint.base:
        head = saved_head(checkpoint.folder)
    save_model(classifier.to(DTYPES[model.dtype]), own, folder)
    save_file({"score.weight": head}, folder / HEAD)


def _recover(taken: Taken, model: ModelSettings, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, float]:
    """Base + differences, or a reward model in AlpacaFarm's own format, as a model of transformers."""
    checkpoint, base = taken.checkpoint, taken.difference_to
    reward, where = taken.product == "reward", checkpoint.complete()
    if checkpoint.alpaca_farm:
        own = AutoConfig.from_pretrained(base.folder) if base else config_of(model)
    else:
        own = AutoConfig.from_pretrained(checkpoint.folder)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    if reward:
        own.num_labels = 1
    dtype, weights = DTYPES[model.dtype], Weights(where)
    with torch.device("meta"):
        skeleton = kind.from_config(own, dtype=dtype)
        embedding = skeleton.get_input_embeddings().weight
        name = next(name for name, parameter in skeleton.named_parameters() if parameter is embedding)
        own.get_text_config().vocab_size = weights.rows(name)
        skeleton = kind.from_config(own, dtype=dtype)
    found = recover(folder, where, base.complete() if base else None, skeleton, dtype)
    settle_tokens(skeleton, tokenizer)
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(folder)
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, scoring=reward)
    if reward:
        save_file({"score.weight": Weights(folder)["score.weight"]}, folder / HEAD)
    return found


def _measured(
    site: Site, model: Path, taken: Taken, tokenizer: PreTrainedTokenizerBase, device: str
) -> dict[str, float]:
    """The reward model's mean score of demonstrations, and its accuracy on held-out comparisons of the data set."""
    settings, source = site.settings.reward, site.source
    # 1. The reward model, alone.
    if taken.reads == CLASSIFIER:
        classifier = load_whole(AutoModelForSequenceClassification, model, "reward model")
        context = Context(source, tokenizer, Roles(classifier).to(device))
        scorer: TextScorer = ClassifierScorer(
            context, str(model), label=None, max_length=settings.max_length, template=settings.template
        )
    else:
        if taken.reads == TEXT:
            tokenizer = keep_template(AutoTokenizer.from_pretrained(model), source)
        roles = reward_alone(site.settings.model, tokenizer, model, None, None).to(device)
        context = Context(source, tokenizer, roles, microbatch_tokens=settings.microbatch_tokens)
        scorer = SeparateRewardModel(context, roles, tokenizer, settings.max_length)
    # 2. What it says of demonstrations and comparisons.
    rows = first_records(source.load("sft"), "sft", settings.baseline_rows)
    if taken.reads == CLASSIFIER:
        baseline = float(scorer.rate([row.prompt for row in rows], [row.response for row in rows]).mean())
    else:
        baseline = RewardModeling(settings, context.roles, tokenizer, 1).baseline(rows)
    metrics = {"reward/baseline": baseline}
    if "preference_validation" in source.splits or (
        "preference" in source.splits and len(source.load("preference")) > 1
    ):
        _, pairs = train_and_held_out(source, "preference", "preference_validation", settings.validation_size)
        sides = [scorer.rate([pair.prompt for pair in pairs], [getattr(pair, side) for pair in pairs])
                 for side in ("chosen", "rejected")]  # fmt: skip
        metrics["reward/accuracy"] = float(accuracy(sides[0] - sides[1]))
        log.info("right on %.1f %% of %d held-out comparisons", 100 * metrics["reward/accuracy"], len(pairs))
    return metrics
