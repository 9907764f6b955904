"""Memory and time of every stage that a run would do, in words (`dry_run=true`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.records import Split
from rlhf.errors import DataError, ModelError
from rlhf.models.loading import load_tokenizer
from rlhf.models.memory import Work, stage_memory
from rlhf.models.sizes import Sizes
from rlhf.pipeline import fetching
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.rows import RowsRead
from rlhf.pipeline.speed import Speed
from rlhf.pipeline.timing import Texts, Times, count_texts
from rlhf.policy_settings import METHODS
from rlhf.settings import Settings

BASIS = (
    "from passes of this model with a few blocks, timed here, and the lengths of the data's texts; an answer is taken "
    "to be as long as a demonstration"
)


TIMED = frozenset({"sft", "preferences", "reward", *METHODS, "evaluate"})  # not the reading of what others trained
Part = tuple[Settings, Sizes, Work]  # what a run does with one of its models


def stage_estimates(plan: Plan, parts: Sequence[Part], read: RowsRead | None) -> dict[str, Any]:
    """For each stage that is still to be done its memory and its time, and what the times are based on.

    `parts` are first what the run does with the policy's model, then with a reward model's own; none of them if the
    sizes of the models are not known. `read` are the rows; None if they are on the Hub.
    """
    if not parts:
        name = plan.settings.model.name_or_path
        return {"time": f"unknown, as the memory: the configuration of model.name_or_path={name} cannot be read here"}
    stages = {
        stage if part is parts[0] else f"{stage} of the reward model": (part, stage)
        for part in parts
        for stage in part[2].stages
    }
    described = {name: {"memory": str(stage_memory(stage, *part))} for name, (part, stage) in stages.items()}
    if read is None:
        remote = ", ".join(fetching.data_sets(plan.plain["data"]))
        return {"stages": described, "time": f"unknown: a dry run does not download {remote}, whose rows decide it"}
    for stage in described.keys() & read.stages.keys():
        described[stage]["rows"] = str(read.stages[stage])
    try:
        # other rows than those that the run reads tell how long answers and comparisons are
        others = {split: plan.source.load(split) for split in plan.source.splits if split not in read.splits}
        tokenizer = load_tokenizer(plan.settings.model, plan.source)
        texts = count_texts({**read.splits, **others}, tokenizer, read.prompts)
    except (DataError, ModelError) as error:
        return {"stages": described, "time": f"unknown: {error}"}
    speeds = {name: Speed(settings, sizes, "cuda" if work.on_gpu else "cpu")
              for name, ((settings, sizes, work), stage) in stages.items() if stage in TIMED}  # fmt: skip
    if not all(speed.fits for speed in speeds.values()):
        return {"stages": described, "time": "unknown: not even a few blocks of the model fit into the free memory"}
    longest, total = plan.settings.generation.max_new_tokens, 0.0
    answer = min(texts["sft"].response, longest) if "sft" in texts else longest
    for name, speed in speeds.items():
        (settings, _, work), stage = stages[name]
        seconds, most = (
            Times(settings, speed, texts, work, _pairs(plan, texts), length).stage(stage)
            for length in ((answer, longest) if stage not in ("sft", "reward") else (answer, answer))
        )
        count = work.stages.count(stage)  # reward models of several seeds
        seconds, most = seconds * count, most * count
        total += seconds
        described[name]["time"] = f"about {in_words(seconds)}"
        if stage not in ("sft", "reward") and answer < longest:
            described[name]["time"] += f"; {in_words(most)} if every answer has {longest} tokens"
    device = "GPU" if parts[0][2].on_gpu else "CPU"
    return {"stages": described, "time": f"about {in_words(total)} on this {device}, {BASIS}"}


def _pairs(plan: Plan, texts: Mapping[Split, Texts]) -> int:
    """The number of simulated comparisons; 0 if they come from the data set."""
    if not plan.preferences_folder:
        return 0
    simulated = plan.plain["preferences"]
    return int((simulated["pairs"] or texts[simulated["split"]].rows) + simulated["validation_pairs"])


def in_words(seconds: float) -> str:
    """A duration: `41 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
