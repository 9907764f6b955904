"""Memory and time of every stage that a run would do, in words (`dry_run=true`)."""

from typing import Any

from rlhf.errors import DataError, ModelError
from rlhf.models.loading import load_tokenizer
from rlhf.models.memory import Work, stage_memory
from rlhf.models.sizes import Sizes
from rlhf.pipeline import fetching
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.speed import Speed
from rlhf.pipeline.timing import Times, count_texts

BASIS = (
    "from passes of this model with a few blocks, timed here, and the lengths of the data's texts; an answer is taken "
    "to be as long as a demonstration"
)


def stage_estimates(plan: Plan, sizes: Sizes | None, work: Work) -> dict[str, Any]:
    """For each stage that is still to be done its memory and its time, and what the times are based on.

    `sizes` are those of the model, None if its configuration cannot be read here.
    """
    if sizes is None:
        name = plan.settings.model.name_or_path
        return {"time": f"unknown, as the memory: the configuration of model.name_or_path={name} cannot be read here"}
    stages = {stage: {"memory": str(stage_memory(stage, plan.settings, sizes, work))} for stage in work.stages}
    try:
        likely, most, answer = _times(plan, sizes, work)
    except (DataError, ModelError) as error:
        return {"stages": stages, "time": f"unknown: {error}"}
    longest = plan.settings.generation.max_new_tokens
    for stage, described in stages.items():
        seconds = likely.stage(stage)
        described["time"] = f"about {in_words(seconds)}"
        if stage not in ("sft", "reward") and answer < longest:
            described["time"] += f"; {in_words(most.stage(stage))} if every answer has {longest} tokens"
    total = sum(likely.stage(stage) for stage in stages)
    return {"stages": stages, "time": f"about {in_words(total)} on this {likely.speed.device}, {BASIS}"}


def _times(plan: Plan, sizes: Sizes, work: Work) -> tuple[Times, Times, float]:
    """Times with answers of the likely and of the greatest length; and the likely length.

    Raises:
        DataError: the data is on the Hub, or cannot be read.
        ModelError: the tokenizer cannot be loaded.
    """
    remote = fetching.data_sets(plan.plain["data"])
    if remote:
        raise DataError(f"a dry run does not download {', '.join(remote)}, whose rows decide it")
    settings = plan.settings
    texts = count_texts(plan.source, load_tokenizer(settings.model, plan.source))
    answer = min(texts["sft"].response, settings.generation.max_new_tokens)
    speed = Speed(settings, sizes, "cuda" if work.on_gpu else "cpu")
    pairs = 0
    if plan.preferences_folder:
        simulated = plan.plain["preferences"]
        pairs = (simulated["pairs"] or texts[simulated["split"]].rows) + simulated["validation_pairs"]
    likely, most = (
        Times(settings, speed, texts, work, pairs, length) for length in (answer, settings.generation.max_new_tokens)
    )
    return likely, most, answer


def in_words(seconds: float) -> str:
    """A duration: `41 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
