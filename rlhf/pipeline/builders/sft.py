"""The SFT model."""

import logging
import time
from pathlib import Path

import lightning
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import skipped_rows, train_and_held_out
from rlhf.distributed import collectives
from rlhf.files import MODEL
from rlhf.guards import Guards
from rlhf.guards.base import Remedies
from rlhf.models.assembly import sft_roles
from rlhf.models.export import load_adapter, save_adapter, save_model
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.models.sharding import full_weights
from rlhf.pipeline import cache
from rlhf.pipeline.builders import Site, steps_of
from rlhf.pipeline.rendered import show_rendered
from rlhf.pipeline.train_supervised import train_supervised
from rlhf.settings import JOINED
from rlhf.stages.cutting import count_short
from rlhf.stages.sft import SupervisedFineTuning
from rlhf.tracking.summary import write_summary

log = logging.getLogger(__name__)


def build_sft(site: Site, folder: Path) -> None:
    """Train the SFT model into `folder`: `model/`, with any adapter merged in."""
    started, settings = time.monotonic(), site.settings.sft
    log.info("training the SFT model (%s)", cache.name_of(folder))
    lightning.seed_everything(settings.seed, verbose=False)
    # 1. The models.
    tokenizer = load_tokenizer(site.settings.model, site.source)
    roles = sft_roles(site.settings, tokenizer, site.quantization)
    site.place(roles, settings.packing is True)
    # 2. The rows.
    train, held_out = train_and_held_out(site.source, "sft", "sft_validation", settings.validation_size)
    stage = SupervisedFineTuning(settings, roles, tokenizer, steps_of(settings, len(train)))
    stage.guards = Guards(site.settings.guards, folder, Remedies.of(site.settings, settings))
    texts = stage.training_rows(train)
    stage.total_steps = steps_of(settings, len(texts))
    first = {"prompt": texts[0][0], "response (learnt)": texts[0][1]}
    collectives.on_rank_zero(lambda: show_rendered(folder, "sft", tokenizer, first))
    limit, cut = f"sft.max_length={settings.max_length}", [] if settings.packing == JOINED else texts
    short = count_short(cut, settings.max_length, tokenizer.eos_token_id, "sft", limit)
    # 3. The training, and what it leaves.
    metrics = train_supervised(site.make_trainer, stage, settings, texts, stage.encode(held_out), folder)
    whole = full_weights(roles) if roles.sharded else None  # every process takes part, the first one writes
    collectives.on_rank_zero(lambda: _save(site, roles, whole, tokenizer, folder))
    counts = {"rows": {"sft": len(train)}, "skipped": skipped_rows(site.source, "sft"), "cut": short}
    if settings.packing == JOINED:
        counts["joined"] = {"texts": len(train), "sequences": len(texts)}
    write_summary(folder, metrics, site.plain, started, stage="sft", guards=stage.guards.summary(), **counts)


def _save(
    site: Site, roles: Roles, whole: dict[str, Tensor] | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write `model/` with the adapter merged in; `whole` are the weights of a base spread over the processes."""
    lora = site.settings.sft.lora
    if whole or (site.quantization and lora.r):
        # merge into the full-precision weights, not into rounded ones, and into all of them, not into a shard
        save_adapter(roles, "policy", roles.adapter_config("policy"), folder, tokenizer, folder / "adapter")
        plain = Roles(load_causal_lm(site.settings.model, tokenizer))
        if whole:
            plain.trunk("reference").load_state_dict(whole)
        load_adapter(plain, "base", "policy", folder / "adapter")
        plain.table["policy"] = roles.table["policy"]
        roles = plain
    # on the CPU, as the copy in float32 may not fit the device
    merged = roles.to("cpu").copy_trunk("policy").to(DTYPES[site.settings.model.dtype])
    save_model(merged, tokenizer, folder / MODEL)
