"""What a run would do and how much memory it needs, found out before anything is loaded."""

import logging
from contextlib import suppress
from typing import Any

import torch

from rlhf.distributed import collectives, processes
from rlhf.errors import ModelError
from rlhf.files import BUDGET, EARLIER, read_object, write_json
from rlhf.models.loading import BPE_VOCABULARY, load_tokenizer
from rlhf.models.memory import Memory, available, estimate, largest_budget
from rlhf.pipeline import cache, earlier
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.plan import Plan

log = logging.getLogger(__name__)


def describe(plan: Plan) -> dict[str, Any]:
    """What a run would do (`dry_run=true`). A run that needs more memory than is free is
    described, not refused, because it may be meant for another machine.
    """
    found = plan.finished()
    place = plan.folder if _is_present(plan) else earlier.place(plan.folder, plan.identity)
    unmade = plan.stage == "ppo" and found is None
    if unmade:
        with suppress(ModelError):
            settle_budget(plan)
    needed = _needed(plan) if unmade else None
    return {
        "folder": str(plan.folder),
        "stage": plan.stage,
        "cached": {path.name: cache.known(path) for path in plan.needed().values()},
        "done": found is not None,
        "same_as": str(found) if found not in (None, plan.folder, place) else None,
        "moves_aside": _moves_aside(plan),
        "step": StepCheckpoints.reached(place / "checkpoints"),
        "memory": f"{needed}; {available() / 2**30:.1f} GiB are free here" if needed else None,
        "microbatch_tokens": plan.settings.ppo.microbatch_tokens if unmade else None,
    }


def _is_present(plan: Plan) -> bool:
    return earlier.identity_of(plan.folder) in (None, plan.identity)


def _moves_aside(plan: Plan) -> str | None:
    """The run of another configuration that would be moved aside, and where to; None if there is none."""
    if _is_present(plan) and (plan.config.resume != "never" or earlier.identity_of(plan.folder) is None):
        return None
    return f"moves {plan.present} to {plan.folder / EARLIER}"


def check_memory(plan: Plan) -> None:
    """Check that a PPO run fits into memory.

    Raises:
        ModelError: it needs more than is free.
    """
    needed, free = _needed(plan), available()
    if needed is not None and needed.peak > free:
        raise ModelError(
            f"the run needs {needed}, and {free / 2**30:.1f} GiB are free; allowed: a smaller model, "
            "quantization=int8|nf4, lora=r8, model.gradient_checkpointing=true, fewer ppo.microbatch_tokens"
        )


def settle_budget(plan: Plan, fresh: bool = False, jobs: int = 1) -> None:
    """Replace `ppo.microbatch_tokens=auto` in the settings by a number.

    A run that is resumed keeps the number that it began with (`keep_budget`), however much memory is free now: another
    number would sum in another order, and the run would not end with the same bits. Otherwise, or if the run starts
    over (`fresh`), it is the largest number that fits, in all processes of the run and with `jobs` runs at once on this
    machine. The configuration, and with it the run's identity, keeps saying auto.

    Raises:
        ModelError: the model's configuration cannot be read, so that its memory cannot be estimated.
    """
    ppo = plan.settings.ppo
    if ppo.microbatch_tokens != "auto":
        return
    kept = None if fresh else collectives.on_rank_zero(lambda: _kept_budget(plan))
    if kept is not None:
        log.info("ppo.microbatch_tokens=auto: %d, as the run began", kept)
        ppo.microbatch_tokens = kept
        return
    sharing = jobs * (1 if torch.cuda.is_available() else processes.local_world_size(plan.config.trainer))
    free = min(collectives.all_gather(available())) // sharing
    shares = processes.num_shards(plan.config.trainer)
    chosen = largest_budget(plan.settings, _vocabulary(plan), plan.needs_reward_model, free, shares)
    if chosen is None:
        raise ModelError(
            "ppo.microbatch_tokens=auto needs the configuration of model.name_or_path="
            f"{plan.settings.model.name_or_path}, which cannot be read; allowed: a number"
        )
    ppo.microbatch_tokens = chosen
    log.info("ppo.microbatch_tokens=auto: %d; the run needs %s, %.1f GiB are free", chosen, _needed(plan), free / 2**30)


def keep_budget(plan: Plan) -> None:
    """Save the number chosen for `ppo.microbatch_tokens=auto` in the run's folder, for when the run is resumed."""
    if plan.plain["ppo"]["microbatch_tokens"] == "auto" and isinstance(plan.settings.ppo.microbatch_tokens, int):
        budget = {"identity": plan.identity, "microbatch_tokens": plan.settings.ppo.microbatch_tokens}
        write_json(plan.folder / BUDGET, budget)


def _kept_budget(plan: Plan) -> int | None:
    """The saved number of this very run; None if there is none."""
    for path in (plan.folder / BUDGET, earlier.place(plan.folder, plan.identity) / BUDGET):
        kept = read_object(path, microbatch_tokens=int) if path.exists() else {}
        if kept.get("identity") == plan.identity:
            return int(kept["microbatch_tokens"])
    return None


def _needed(plan: Plan) -> Memory | None:
    return estimate(
        plan.settings, _vocabulary(plan), plan.needs_reward_model, processes.num_shards(plan.config.trainer)
    )


def _vocabulary(plan: Plan) -> int | None:
    """The vocabulary of the tokenizer for a model made from a configuration; None for a model that is loaded."""
    if plan.settings.model.name_or_path is not None:
        return None
    known = hasattr(plan.source, "tokenizer")
    return len(load_tokenizer(plan.settings.model, plan.source)) if known else BPE_VOCABULARY
