"""What a run would do and need, before anything is loaded."""

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
from rlhf.pipeline.run import Run

log = logging.getLogger(__name__)


def describe(run: Run) -> dict[str, Any]:
    """What a run would do (`dry_run=true`); here nothing is refused, as it may be meant for another machine."""
    found = run.finished()
    place = run.folder if _is_present(run) else earlier.place(run.folder, run.identity)
    unmade = run.config.stage.name == "ppo" and found is None
    if unmade:
        with suppress(ModelError):
            settle_budget(run)
    needed = _needed(run) if unmade else None
    return {
        "folder": str(run.folder),
        "stage": run.config.stage.name,
        "cached": {path.name: cache.known(path) for path in run.needed()},
        "done": found is not None,
        "same_as": str(found) if found not in (None, run.folder, place) else None,
        "moves_aside": _moves_aside(run),
        "step": StepCheckpoints.reached(place / "checkpoints"),
        "memory": f"{needed}; {available() / 2**30:.1f} GiB are free here" if needed else None,
        "microbatch_tokens": run.settings.ppo.microbatch_tokens if unmade else None,
    }


def _is_present(run: Run) -> bool:
    return earlier.identity_of(run.folder) in (None, run.identity)


def _moves_aside(run: Run) -> str | None:
    """What the run would find in its folder and move aside, and where to."""
    if _is_present(run) and (run.config.resume != "never" or earlier.identity_of(run.folder) is None):
        return None
    return f"moves {run.present} to {run.folder / EARLIER}"


def check_memory(run: Run) -> None:
    """See whether a PPO run fits, before anything is loaded.

    Raises:
        ModelError: it needs more than the machine has.
    """
    needed, free = _needed(run), available()
    if needed is not None and needed.peak > free:
        raise ModelError(
            f"the run needs {needed}, and {free / 2**30:.1f} GiB are free; allowed: a smaller model, "
            "quantization=int8|nf4, lora=r8, model.gradient_checkpointing=true, fewer ppo.microbatch_tokens"
        )


def settle_budget(run: Run, fresh: bool = False, jobs: int = 1) -> None:
    """Put a number in the place of `ppo.microbatch_tokens=auto`.

    It is the one that the run in this folder began with (`keep_budget`), whatever is free now, because another would
    add up in another order, so that the run would not end with the same bits; or else (or if it shall start over,
    `fresh`) the largest that fits, in all its processes and beside the other `jobs` at once. The configuration, and so
    the run's identity, goes on saying auto.

    Raises:
        ModelError: the model's configuration cannot be read, so that nothing is known of its memory.
    """
    ppo = run.settings.ppo
    if ppo.microbatch_tokens != "auto":
        return
    kept = None if fresh else collectives.on_rank_zero(lambda: _kept_budget(run))
    if kept is not None:
        log.info("ppo.microbatch_tokens=auto: %d, as the run began", kept)
        ppo.microbatch_tokens = kept
        return
    sharing = jobs * (1 if torch.cuda.is_available() else processes.local_world_size(run.config.trainer))
    free = min(collectives.all_gather(available())) // sharing
    shares = processes.num_shards(run.config.trainer)
    chosen = largest_budget(run.settings, _vocabulary(run), run.needs_reward_model, free, shares)
    if chosen is None:
        raise ModelError(
            "ppo.microbatch_tokens=auto needs the configuration of model.name_or_path="
            f"{run.settings.model.name_or_path}, which cannot be read; allowed: a number"
        )
    ppo.microbatch_tokens = chosen
    log.info("ppo.microbatch_tokens=auto: %d; the run needs %s, %.1f GiB are free", chosen, _needed(run), free / 2**30)


def keep_budget(run: Run) -> None:
    """Leave in the run's folder what was put in the place of auto, for those who continue it."""
    if run.plain["ppo"]["microbatch_tokens"] == "auto" and isinstance(run.settings.ppo.microbatch_tokens, int):
        budget = {"identity": run.identity, "microbatch_tokens": run.settings.ppo.microbatch_tokens}
        write_json(run.folder / BUDGET, budget)


def _kept_budget(run: Run) -> int | None:
    """None without any, or with that of a run of another configuration."""
    for path in (run.folder / BUDGET, earlier.place(run.folder, run.identity) / BUDGET):
        kept = read_object(path, microbatch_tokens=int) if path.exists() else {}
        if kept.get("identity") == run.identity:
            return int(kept["microbatch_tokens"])
    return None


def _needed(run: Run) -> Memory | None:
    return estimate(run.settings, _vocabulary(run), run.needs_reward_model, processes.num_shards(run.config.trainer))


def _vocabulary(run: Run) -> int | None:
    """That of the tokenizer, for a model made from a configuration."""
    if run.settings.model.name_or_path is not None:
        return None
    known = hasattr(run.source, "tokenizer")
    return len(load_tokenizer(run.settings.model, run.source)) if known else BPE_VOCABULARY
