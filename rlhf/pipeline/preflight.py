"""What a run would do and how much memory it needs, found out before anything is loaded."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf

from rlhf.distributed import collectives, processes
from rlhf.errors import ModelError
from rlhf.files import BUDGET, EARLIER, read_object, write_json
from rlhf.models.activations import FLOAT32, Passes
from rlhf.models.loading import BPE_VOCABULARY, DTYPES, load_tokenizer
from rlhf.models.memory import Work, available, estimate
from rlhf.models.sizes import Sizes
from rlhf.pipeline import cache, earlier, fetching, members
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.config import target_class
from rlhf.pipeline.estimates import stage_estimates
from rlhf.pipeline.fitting import advice, with_numbers
from rlhf.pipeline.measuring import unmeasured
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.precision import trains_on_gpu
from rlhf.pipeline.rows import RowsRead
from rlhf.pipeline.taken import CLASSIFIER, IDS
from rlhf.policy_settings import METHODS
from rlhf.settings import LoraSettings, Settings

log = logging.getLogger(__name__)
# A number that memory may decide, as it is called in the saved budget → its key in the configuration.
AUTOMATIC_KEYS = {"batch_size": "generation.batch_size", "microbatch_tokens": "ppo.microbatch_tokens"}


def describe(plan: Plan, read: RowsRead | None = None, timed: bool = True) -> dict[str, Any]:
    """What a run would do (`dry_run=true`), given its rows; with `timed`, also how long it would take here.

    A run that needs more memory than is free is described, not refused, because it may be meant for another machine.
    """
    found = plan.finished()
    place = plan.folder if _is_present(plan) else earlier.place(plan.folder, plan.noted)
    unmade = found is None
    if unmade:
        with suppress(ModelError):
            settle_budget(plan)
    parts = list(_parts(plan)) if unmade else []
    needed = max((estimate(*part) for part in parts), key=lambda memory: memory.peak, default=None)
    return {
        "folder": str(plan.folder),
        "stage": plan.stage,
        "cached": {path.name: cache.known(path) for path in members.needed(plan).values()},
        "taken": {product: taken.described for product, taken in plan.taken.items()} or None,
        "done": found is not None,
        "measures": sorted(unmeasured(plan, found)) if found else [],
        "same_as": str(found) if found not in (None, plan.folder, place) else None,
        "moves_aside": _moves_aside(plan),
        "step": StepCheckpoints.reached(place / "checkpoints"),
        "memory": f"{needed}; {_free(plan) / 2**30:.1f} GiB are free here" if needed else None,
        "microbatch_tokens": plan.settings.method(plan.stage).microbatch_tokens if unmade else None,
        "batch_size": plan.settings.generation.batch_size if unmade else None,
        "fetches": {**fetching.checkpoints(plan.plain), "data": fetching.data_sets(plan.plain["data"])}
        if unmade
        else {},
        **(stage_estimates(plan, parts, read) if unmade and timed else {}),
    }


def _is_present(plan: Plan) -> bool:
    return earlier.identity_of(plan.folder) in (None, plan.noted)


def _moves_aside(plan: Plan) -> str | None:
    """The run of another configuration that would be moved aside, and where to; None if there is none."""
    if _is_present(plan) and (plan.config.resume != "never" or earlier.identity_of(plan.folder) is None):
        return None
    return f"moves {plan.present} to {plan.folder / EARLIER}"


def check_memory(plan: Plan) -> None:
    """Check that all stages of a run that are not finished yet fit into memory.

    Raises:
        ModelError: one of them needs more than is free.
    """
    free = _free(plan)
    for settings, sizes, work in _parts(plan):
        needed = estimate(settings, sizes, work)
        if needed.peak > free:
            raise ModelError(
                f"the run needs {needed}, and {free / 2**30:.1f} GiB are free; allowed: "
                f"{advice(settings, sizes, work, free)}"
            )


def settle_budget(plan: Plan, fresh: bool = False, jobs: int = 1) -> None:
    """Replace `ppo.microbatch_tokens=auto` and `generation.batch_size=auto` in the settings by numbers.

    A run that is resumed keeps the numbers that it began with (`keep_budget`), however much memory is free now: others
    would sum in another order, and the run would not end with the same bits. Otherwise, or if the run starts over
    (`fresh`), they are the largest that fit (`with_numbers`), in all processes of the run and with `jobs` runs at once
    on this machine. The configuration, and with it the run's identity, keeps saying auto.

    Raises:
        ModelError: the model's configuration cannot be read, so that its memory cannot be estimated.
    """
    keys = _automatic(plan)
    if not keys or plan.stage == "sft":
        return
    kept = {} if fresh else collectives.on_rank_zero(lambda: _kept_budget(plan, keys))
    if kept:
        _set(plan, kept, ", as the run began")
        return
    sharing = jobs * (1 if trains_on_gpu(plan.config) else processes.local_world_size(plan.config.trainer))
    free = min(collectives.all_gather(_free(plan))) // sharing
    sizes, work = _sizes(plan), work_of(plan, unmade=False)  # so that the same run begins with the same numbers
    if sizes is None:
        raise ModelError(
            f"{AUTOMATIC_KEYS[min(keys)]}=auto needs the configuration of model.name_or_path="
            f"{plan.settings.model.name_or_path}, which cannot be read; allowed: a number"
        )
    chosen = with_numbers(assumed(plan), sizes, work, free)
    needed = estimate(chosen, sizes, work)
    _set(plan, _numbers(chosen, keys), f"; the run needs {needed}, {free / 2**30:.1f} GiB are free")


def keep_budget(plan: Plan) -> None:
    """Save the numbers chosen for keys that say auto in the run's folder, for when the run is resumed."""
    keys = {key for key, name in AUTOMATIC_KEYS.items() if OmegaConf.select(plan.config, name) == "auto"}
    numbers = _numbers(plan.settings, keys)
    if numbers and "auto" not in numbers.values():
        write_json(plan.folder / BUDGET, {"identity": plan.identity, **numbers})


def work_of(plan: Plan, unmade: bool) -> Work:
    """What the run does, its products included; with `unmade`, only those that are not in the cache yet."""
    products = _stages(plan, unmade, beside=False)
    own = [plan.stage] if plan.stage in (*METHODS, "evaluate") else []
    fallback = "taken" if plan.stage in plan.taken else plan.stage
    return Work(
        stages=(*products, *own) or (fallback,),
        reward_model=plan.needs_reward_model and plan.reward_reads == IDS,
        beside=_beside(plan) if own and plan.needs_reward_model else 0,
        answer_tokens=plan.plain["preferences"].get("max_new_tokens", 0),
        shares=processes.num_shards(plan.config.trainer),
        on_gpu=trains_on_gpu(plan.config),
        moving=target_class(plan.config.reference, "reference").role,
        members=members.ensemble_size(plan.config) - 1,
    )


def _automatic(plan: Plan) -> set[str]:
    """Which of `AUTOMATIC_KEYS` still say auto."""
    return {key for key, number in _numbers(plan.settings, AUTOMATIC_KEYS).items() if number == "auto"}


def _numbers(settings: Settings, keys: Iterable[str]) -> dict[str, Any]:
    numbers = {"microbatch_tokens": settings.ppo.microbatch_tokens, "batch_size": settings.generation.batch_size}
    return {key: numbers[key] for key in keys}


def _set(plan: Plan, numbers: Mapping[str, int], why: str) -> None:
    plan.settings.ppo.microbatch_tokens = numbers.get("microbatch_tokens", plan.settings.ppo.microbatch_tokens)
    plan.settings.generation.batch_size = numbers.get("batch_size", plan.settings.generation.batch_size)
    for key, number in sorted(numbers.items()):
        log.info("%s=auto: %d%s", AUTOMATIC_KEYS[key], number, why)


def _kept_budget(plan: Plan, keys: Iterable[str]) -> dict[str, int]:
    """The saved numbers of this very run; empty if there are none."""
    for path in (plan.folder / BUDGET, earlier.place(plan.folder, plan.noted) / BUDGET):
        kept = read_object(path) if path.exists() else {}
        if kept.get("identity") in (plan.identity, plan.noted):
            return {key: read_object(path, **{key: int})[key] for key in keys}
    return {}


def _free(plan: Plan) -> int:
    """Free memory of the device that the run trains on, in bytes."""
    return available(trains_on_gpu(plan.config))


def _sizes(plan: Plan) -> Sizes | None:
    return Sizes.of(plan.settings.model, _vocabulary(plan))


def _parts(plan: Plan) -> Iterator[tuple[Settings, Sizes, Work]]:
    """What the run does with the policy's model, and with a reward model's own; neither if its sizes are unknown."""
    sizes = _sizes(plan)
    if sizes is not None:
        yield assumed(plan), sizes, work_of(plan, unmade=True)
    stages = _stages(plan, unmade=True, beside=True)
    if plan.beside and stages and (own := _sizes(plan.beside)):
        yield plan.beside.settings, own, Work(tuple(stages), on_gpu=trains_on_gpu(plan.config))


def _stages(plan: Plan, unmade: bool, beside: bool) -> list[str]:
    """The stages that make the products of a run, those of a reward model on a model of its own apart (`beside`)."""

    def stages() -> Iterator[str]:
        for product, folder in members.needed(plan).items():
            apart = bool(plan.beside) and product.startswith("reward")
            if apart != beside or (unmade and cache.known(folder)):
                continue
            if product not in plan.taken:
                yield members.stage_of(product)
            elif plan.taken[product].reads != CLASSIFIER:
                yield "taken" if plan.taken[product].whole else "merged"

    return collectives.on_rank_zero(lambda: list(stages()))


def _beside(plan: Plan) -> int:
    """Bytes of the weights of a reward model that is no role; 0 if they are unknown."""
    if plan.beside:
        sizes, model = _sizes(plan.beside), plan.beside.settings
        base = Passes(model, sizes).size * sizes.parameters if sizes else 0
        return base + (FLOAT32 * sizes.adapter(model.reward.lora) if sizes else 0)
    if plan.reward_reads == IDS:
        return 0
    taken = plan.taken["reward"]
    size = FLOAT32 if taken.reads == CLASSIFIER else torch.finfo(DTYPES[plan.settings.model.dtype]).bits // 8
    return size * taken.checkpoint.parameters


def assumed(plan: Plan) -> Settings:
    """The settings as the estimates need them: a reward model that is taken as a whole is no adapter."""
    taken = plan.taken.get("reward")
    if taken is None or (plan.in_place("reward") and not taken.whole):
        return plan.settings
    return replace(plan.settings, reward=replace(plan.settings.reward, lora=LoraSettings(r=0)))


def _vocabulary(plan: Plan) -> int | None:
    """The vocabulary of the tokenizer for a model made from a configuration; None for a model that is loaded."""
    if plan.settings.model.name_or_path is not None:
        return None
    known = hasattr(plan.source, "tokenizer")
    return len(load_tokenizer(plan.settings.model, plan.source)) if known else BPE_VOCABULARY
