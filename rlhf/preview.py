"""What a run would do and need, before anything is loaded."""

from typing import Any

from rlhf import parallel, tracking
from rlhf.checkpoints import StepCheckpoints
from rlhf.models import ModelError
from rlhf.models.loading import BPE_VOCABULARY, load_tokenizer
from rlhf.models.memory import Memory, available, estimate
from rlhf.pipeline import Run


def describe(run: Run) -> dict[str, Any]:
    """What a run would do (`dry_run=true`); here nothing is refused, as it may be meant for another machine."""
    found = run.finished()
    needed = _needed(run) if run.config.stage.name == "ppo" and found is None else None
    return {
        "folder": str(run.folder),
        "stage": run.config.stage.name,
        "cached": {path.name: tracking.read_summary(path) is not None for path in run.needed()},
        "done": found is not None,
        "same_as": str(found) if found not in (None, run.folder) else None,
        "step": StepCheckpoints.reached(run.folder / "checkpoints"),
        "memory": f"{needed}; {available() / 2**30:.1f} GiB are free here" if needed else None,
    }


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


def _needed(run: Run) -> Memory | None:
    vocabulary = None
    if run.settings.model.name_or_path is None:
        known = hasattr(run.source, "tokenizer")
        vocabulary = len(load_tokenizer(run.settings.model, run.source)) if known else BPE_VOCABULARY
    return estimate(run.settings, vocabulary, run.needs_reward_model, parallel.shares(run.config.trainer))
