"""Fit a run into memory: choose what is `auto`, and find changes of the configuration with which it would fit."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

from rlhf.models.memory import Work, estimate, longest_text, stage_memory
from rlhf.models.sizes import Sizes
from rlhf.policy_settings import METHODS
from rlhf.settings import LoraSettings, Settings

AUTOMATIC = 0.8  # share of the free memory that an automatic number may use: the estimate is right within a fifth
SEVERAL = 3  # sets of changes that are proposed at most
Change = tuple[str, Settings]  # an override, and the settings with it


def with_numbers(settings: Settings, sizes: Sizes, work: Work, free: int) -> Settings:
    """The settings with numbers for `generation.batch_size=auto` and `ppo.microbatch_tokens=auto`.

    Each is the largest whose phases need at most `AUTOMATIC` of `free` bytes, or the smallest if none does. Sampling
    and updating alternate, so that neither number limits the other.
    """
    # The other number may be unknown yet, but counts in other phases.
    batch_size, budget = settings.generation.batch_size, settings.ppo.microbatch_tokens

    def fits(batch_size: int, budget: int, stages: Collection[str], phases: Sequence[str]) -> bool:
        tried = _numbered(settings, batch_size, budget)
        memory = [stage_memory(stage, tried, sizes, work) for stage in work.stages if stage in stages]
        return all(needed.peak_of(*phases) <= AUTOMATIC * free for needed in memory)

    if batch_size == "auto":
        phases, stages = ("generating", "evaluating"), ("preferences", *METHODS, "evaluate")
        batch_size = _largest(_batch_sizes(settings), lambda rows: fits(rows, 1, stages, phases))
    if budget == "auto":
        budget = _largest(
            _budgets(settings), lambda tokens: fits(1, tokens, ("ppo", "evaluate"), ("scoring", "updating"))
        )
    return _numbered(settings, batch_size, budget)


def _largest(numbers: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of some ascending numbers that fits, if smaller ones do too; the smallest if none does."""
    return numbers[max(bisect_left(numbers, True, key=lambda number: not fits(number)) - 1, 0)]


def _numbered(settings: Settings, batch_size: int, budget: int) -> Settings:
    return _with(_with(settings, "generation", "batch_size", batch_size), "ppo", "microbatch_tokens", budget)


def _batch_sizes(settings: Settings) -> list[int]:
    """A rollout batch divided into 1, 2, 3, … equal parts; ascending."""
    rows = settings.ppo.rollout_batch_size
    return sorted({-(-rows // parts) for parts in range(1, rows + 1)})


def _budgets(settings: Settings) -> list[int]:
    """Powers of two from the longest text to a whole minibatch of such texts; ascending."""
    smallest, most = longest_text(settings), longest_text(settings) * settings.ppo.minibatch_size
    return [2**power for power in range((smallest - 1).bit_length(), (most - 1).bit_length() + 1)]


# -- advice ------------------------------------------------------------------------------------------------------------


def advice(settings: Settings, sizes: Sizes, work: Work, free: int) -> str:
    """What would make a run fit that does not: the fewest changes, as overrides; each set of them was estimated."""

    def fits(changed: Settings) -> bool:
        return estimate(with_numbers(changed, sizes, work, free), sizes, work).peak <= free

    found = []
    int8 = (settings.quantization or {}).get("load_in_8bit")
    known = (_nf4, *CHANGES[:-1]) if int8 else CHANGES  # the nearest change of int8 comes first
    for count in range(1, len(known) + 1):
        for changes in combinations(known, count):
            words, changed = [], settings
            for change in changes:
                word, changed = change(changed, sizes, work) or ("", changed)
                words.append(word)
            if all(words) and fits(changed):
                found.append(" with ".join(words))
        if found:
            return ", or ".join(found[:SEVERAL])
    return "a smaller model, or more memory"


def _fewer_answers(settings: Settings, sizes: Sizes, work: Work) -> Change | None:
    if not {"preferences", *METHODS, "evaluate"} & set(work.stages):
        return None
    return "generation.batch_size=auto", _with(settings, "generation", "batch_size", "auto")


def _smaller_updates(settings: Settings, sizes: Sizes, work: Work) -> Change | None:
    if "ppo" not in work.stages:
        return None
    return "ppo.microbatch_tokens=auto", _with(settings, "ppo", "microbatch_tokens", "auto")


def _smaller_passes(stage: str, settings: Settings, sizes: Sizes, work: Work) -> Change | None:
    """The smallest passes of a stage that learns from texts: one text, or one pair of them."""
    own = getattr(settings, stage)
    longest = own.max_length * (1 if stage == "sft" else 2)
    if stage not in work.stages or longest >= own.microbatch_tokens:
        return None
    return f"{stage}.microbatch_tokens={longest}", _with(settings, stage, "microbatch_tokens", longest)


def _checkpointing(settings: Settings, sizes: Sizes, work: Work) -> Change | None:
    if settings.model.gradient_checkpointing:
        return None
    return "model.gradient_checkpointing=true", _with(settings, "model", "gradient_checkpointing", True)


def _adapters(settings: Settings, sizes: Sizes, work: Work) -> Change | None:
    """Adapters in place of whole models, in the stages that train."""
    words, small = [], LoraSettings(r=8, alpha=64, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    if not sizes.adapted(small):  # another architecture, whose layers have other names
        return None
    if settings.sft.lora.r == 0 and "sft" in work.stages:
        words, settings = ["lora@sft.lora=r8"], _with(settings, "sft", "lora", small)
    if settings.reward.lora.r == 0 and "reward" in work.stages:
        words, settings = [*words, "lora@reward.lora=r8"], _with(settings, "reward", "lora", small)
    if settings.lora.r == 0 and set(METHODS) & set(work.stages):
        words, settings = [*words, "lora=r8"], replace(settings, lora=small)
    return (" ".join(words), settings) if words else None


def _nf4(settings: Settings, sizes: Sizes, work: Work) -> Change | None:
    """Quantisation, where it is allowed: for adapters, in one process that does not shard, and not for vLLM."""
    whole = [settings.lora.r == 0 and bool({*METHODS} & {*work.stages}),
             settings.ppo.value_model == "full" and "ppo" in work.stages,
             settings.reward.lora.r == 0 and "reward" in work.stages,
             settings.sft.lora.r == 0 and work.stages == ("sft",)]  # fmt: skip
    options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    refused = any(whole) or work.shares > 1 or settings.generation.engine == "vllm"
    if refused or (settings.quantization or {}).get("load_in_4bit"):
        return None
    return "quantization=nf4", replace(settings, quantization=options)


CHANGES: tuple[Callable[[Settings, Sizes, Work], Change | None], ...] = (
    _fewer_answers, _smaller_updates, partial(_smaller_passes, "sft"), partial(_smaller_passes, "reward"),
    partial(_smaller_passes, "dpo"),
    _checkpointing, _adapters, _nf4,
)  # fmt: skip


def _with(settings: Settings, group: str, key: str, value: Any) -> Settings:
    return replace(settings, **{group: replace(getattr(settings, group), **{key: value})})
