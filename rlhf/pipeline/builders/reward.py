"""The reward model."""

import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf.data.records import Comparison, first_records, skipped_rows, train_and_held_out
from rlhf.data.saved_preferences import SavedPreferences
from rlhf.distributed import collectives
from rlhf.errors import DataError
from rlhf.files import MODEL
from rlhf.guards import Guards
from rlhf.guards.base import Remedies
from rlhf.models.assembly import reward_alone, reward_roles
from rlhf.models.averaging import average_reward_models
from rlhf.models.export import HEAD, save_adapter, save_model
from rlhf.models.loading import load_tokenizer
from rlhf.models.roles import Roles
from rlhf.pipeline import cache
from rlhf.pipeline.builders import Site, steps_of
from rlhf.pipeline.rendered import show_rendered
from rlhf.pipeline.train_supervised import train_supervised
from rlhf.stages.cutting import count_short, distinct
from rlhf.stages.pairs import Pair, grouped
from rlhf.stages.reward import RewardModeling, accuracy_by_kind, held_out_metrics, longer_accuracy
from rlhf.stages.reward_offsets import fit_length_coef
from rlhf.tracking.summary import read_summary, write_summary

log = logging.getLogger(__name__)


def build_reward(
    site: Site, folder: Path, sft: Path, preferences: Path | None = None, members: Sequence[Path] = ()
) -> None:
    """Train a reward model on the SFT model of the folder `sft` into `folder`: `model/`, an adapter or whole.

    It learns from the simulated comparisons of the folder `preferences`, or else from those of the data set. With
    `members`, the folders of such reward models, it is their average instead, and is only measured here.
    """
    if members:
        _average(site, folder, sft, preferences, members)
    else:
        _train(site, folder, sft, preferences)


def _train(site: Site, folder: Path, sft: Path, preferences: Path | None) -> None:
    started, settings = time.monotonic(), site.settings.reward
    log.info("training the reward model (%s)", cache.name_of(folder))
    lightning.seed_everything(settings.seed, verbose=False)
    # 1. The models.
    base = sft / MODEL
    tokenizer = load_tokenizer(site.settings.model, site.source)
    roles = reward_roles(site.settings, tokenizer, base, site.quantization)
    site.place(roles, False)
    # 2. The comparisons, without pairs that are equal once they are cut.
    source = SavedPreferences(preferences) if preferences else site.source
    train, held_out = train_and_held_out(source, "preference", "preference_validation", settings.validation_size)
    stage = RewardModeling(settings, roles, tokenizer, steps_of(settings, len(train)))
    stage.guards = Guards(site.settings.guards, folder, Remedies.of(site.settings, settings))
    limit = f"reward.max_length={settings.max_length}"
    train, pairs, equal = distinct(train, stage.encode(train), "preference", limit)
    kinds = source.kinds() if hasattr(source, "kinds") and "preference_validation" in source.splits else []
    compared = list(itertools.zip_longest(held_out, kinds[: len(held_out)]))
    compared, measured, _ = distinct(compared, stage.encode(held_out), "preference, held out", limit)
    held_out = [row for row, _ in compared]
    texts = list({id(text): text for pair in pairs for text in pair}.values())  # equal ones are one object
    (prompt, chosen), (_, rejected) = pairs[0]
    first = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    collectives.on_rank_zero(lambda: show_rendered(folder, "reward", tokenizer, first))
    short = count_short(texts, settings.max_length, tokenizer.eos_token_id, "preference", limit)
    _settle_offsets(stage, pairs)
    groups = grouped(pairs) if settings.group_prompts else pairs
    stage.total_steps = steps_of(settings, len(groups))
    # 3. The training, and what it leaves.
    metrics = train_supervised(site.make_trainer, stage, settings, groups, measured, folder)
    metrics |= {"reward/baseline": _baseline(site, stage), "reward/longer_accuracy": longer_accuracy(held_out)}
    log.info("right on %.1f %% of %d held-out comparisons; always preferring the longer answer is right on %.1f %%",
             100 * metrics["reward/accuracy"], len(held_out), 100 * metrics["reward/longer_accuracy"])  # fmt: skip
    by_kind = _by_kind(compared, stage.held_out_margins) if kinds else {}
    collectives.on_rank_zero(lambda: _save(site, roles, tokenizer, base, folder / MODEL))
    counts = {"rows": {"preference": len(train)}, "skipped": skipped_rows(source, "preference") | equal, "cut": short}
    learned: dict[str, Any] = {"preferences": preferences.name} if preferences else {}
    learned |= {"length_coef": stage.length_coef} if stage.length_coef else {}
    summed = {"guards": stage.guards.summary(), **counts, **learned, **({"by_kind": by_kind} if by_kind else {})}
    write_summary(folder, metrics, site.plain, started, stage="reward", **summed)


def _average(site: Site, folder: Path, sft: Path, preferences: Path | None, members: Sequence[Path]) -> None:
    """Write the average of reward models into `folder`, and measure it as its members were."""
    started, settings = time.monotonic(), site.settings.reward
    log.info("averaging %d reward models (%s)", len(members), cache.name_of(folder))
    # 1. The average, which replaces the weights of a reward model that is not trained.
    tokenizer = load_tokenizer(site.settings.model, site.source)
    models = [member / MODEL for member in members]
    collectives.on_rank_zero(lambda: average_reward_models(models, tokenizer, folder / MODEL))
    base = sft / MODEL if settings.lora.r else None
    roles = reward_alone(site.settings.model, tokenizer, folder / MODEL, base, site.quantization)
    site.place(roles, False)
    # 2. What it says of held-out comparisons and of demonstrations.
    source = SavedPreferences(preferences) if preferences else site.source
    _, rows = train_and_held_out(source, "preference", "preference_validation", settings.validation_size)
    stage = RewardModeling(settings, roles, tokenizer, 1)
    rows, pairs, _ = distinct(
        rows, stage.encode(rows), "preference, held out", f"reward.max_length={settings.max_length}"
    )
    metrics = held_out_metrics(stage.scores_of(stage.collate(pairs))) | {"reward/baseline": _baseline(site, stage)}
    metrics["reward/longer_accuracy"] = longer_accuracy(rows)
    each = [(read_summary(member) or {})["metrics"]["reward/accuracy"] for member in members]
    log.info("right on %.1f %% of %d held-out comparisons; its members on %s %%", 100 * metrics["reward/accuracy"],
             len(rows), ", ".join(f"{100 * accuracy:.1f}" for accuracy in each))  # fmt: skip
    of = {"members": [member.name for member in members], **({"preferences": preferences.name} if preferences else {})}
    write_summary(folder, metrics, site.plain, started, stage="reward", **of)


def _baseline(site: Site, stage: RewardModeling) -> float:
    """The reward model's mean score of demonstrations."""
    demonstrations = first_records(site.source.load("sft"), "sft", site.settings.reward.baseline_rows)
    return stage.baseline(demonstrations)


def _settle_offsets(stage: RewardModeling, pairs: list[Pair]) -> None:
    """Fit the length coefficient to the training pairs, if it says auto; check that there are margins to use."""
    settings = stage.reward
    if settings.length_coef == "auto":
        stage.length_coef = fit_length_coef(pairs)
        log.info("reward.length_coef=auto: %.4f nats per token", stage.length_coef)
    if settings.margin_coef and not stage.data_margins:
        raise DataError(f"reward.margin_coef={settings.margin_coef}: no comparison has a margin; allowed: 0")


def _by_kind(compared: list[tuple[Comparison, str]], margins: list[float]) -> dict[str, dict[str, float]]:
    """The accuracy on each kind of held-out comparison, also logged."""
    table = accuracy_by_kind([row for row, _ in compared], margins, [kind for _, kind in compared])
    lines = [
        f"{kind:<20}{row['pairs']:>6}{100 * row['accuracy']:>9.1f}{100 * row['longer_accuracy']:>9.1f}"
        for kind, row in table.items()
    ]
    log.info("%s", "\n".join([f"{'comparisons':<20}{'pairs':>6}{'right %':>9}{'longer %':>9}", *lines]))
    return table


def _save(site: Site, roles: Roles, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    if site.settings.reward.lora.r:
        save_adapter(roles, "reward", roles.adapter_config("reward"), base, tokenizer, folder)
    else:
        save_full_reward(roles, tokenizer, base, folder)


def save_full_reward(roles: Roles, tokenizer: PreTrainedTokenizerBase, base: Path, folder: Path) -> None:
    """Save a whole reward model as transformers' sequence classifier, with the architecture of the model at `base`."""
    config = AutoConfig.from_pretrained(base, num_labels=1)
    with torch.device("meta"):  # nothing is read or drawn: all weights follow
        model = AutoModelForSequenceClassification.from_config(config)
    weights, head = roles.trunk("reward").base_model.state_dict(), roles.heads["reward"].state_dict()["weight"]
    model.base_model.load_state_dict({name: weight.to(config.dtype) for name, weight in weights.items()}, assign=True)
    model.score.weight = torch.nn.Parameter(head.to(config.dtype))
    save_model(model, tokenizer, folder)
    save_file({"score.weight": head.cpu()}, folder / HEAD)  # the float32 head, beside its copy in the model's dtype
