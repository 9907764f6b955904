"""The rows that a run will read, looked at before anything is trained, and how many steps they make."""

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass

from datasets import Dataset
from omegaconf import OmegaConf

from rlhf.data.records import DataSource, Split, count_prompts, count_rows, held_out_rows, skipped_rows
from rlhf.errors import ConfigError
from rlhf.pipeline import cache, fetching
from rlhf.pipeline.builders import steps_of
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.users_functions import try_scorer
from rlhf.policy_settings import FROM_COMPARISONS, METHODS
from rlhf.settings import JOINED, Settings

log = logging.getLogger(__name__)
NAMES = {"sft": "SFT", "reward": "reward model"}  # of the supervised stages, in messages
STAGES: tuple[tuple[str, Split, Split], ...] = (
    ("sft", "sft", "sft_validation"),
    ("reward", "preference", "preference_validation"),
)


@dataclass(frozen=True)
class Rows:
    """How many rows of a split a supervised stage trains on and holds out, how many were skipped, and its steps.

    `steps` is None if texts are joined, since their number is not known before. `unit` is what a batch counts: rows,
    or the prompts of comparisons.
    """

    train: int
    held_out: int
    skipped: int
    batch_size: int
    steps: int | None
    unit: str = "rows"

    def __str__(self) -> str:
        of = f"{self.batch_size} prompts" if self.unit == "prompts" else str(self.batch_size)
        steps = "" if self.steps is None else f" ({self.steps} steps of {of})"
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.train} rows to train on{steps}, {self.held_out} held out{skipped}"


def rows_of(
    settings: Settings, source: DataSource, counts: Mapping[Split, int], stage: str, prompts: int = 0
) -> Rows | None:
    """The rows of a stage, from the number of rows of each split; None if it reads none of them.

    `prompts` is the number of prompts of the comparisons, which `reward.group_prompts` trains on together.

    Raises:
        DataError: none are left to train on.
        ConfigError: the warm-up would last longer than the training.
    """
    _, split, validation = next(names for names in STAGES if names[0] == stage)
    if split not in counts:
        return None
    own = settings.sft if stage == "sft" else settings.reward
    if validation in source.splits:
        train, held_out = counts[split], min(own.validation_size, counts.get(validation, own.validation_size))
    else:
        held_out = held_out_rows(counts[split], split, validation, own.validation_size)
        train = counts[split] - held_out
    units, unit = (prompts, "prompts") if getattr(own, "group_prompts", False) else (train, "rows")
    steps = None if getattr(own, "packing", False) == JOINED else steps_of(own, units)
    if steps is not None and own.warmup_steps > steps:
        batches = f"{stage}.epochs={own.epochs:g}, {stage}.batch_size={own.batch_size}"
        raise ConfigError(
            f"{stage}.warmup_steps={own.warmup_steps} is longer than the training: {units} {unit} make {steps} "
            f"step{'s' * (steps != 1)} ({batches}); allowed: at most {steps}, more epochs, or smaller batches"
        )
    return Rows(train, held_out, sum(skipped_rows(source, split).values()), own.batch_size, steps, unit)


@dataclass(frozen=True)
class RowsRead:
    """The rows that a run will read, by split, and what its supervised stages make of them.

    `prompts` is the number of prompts of the comparisons, 0 unless they are trained on together. `stages` has sft and
    reward where that model is missing.
    """

    splits: Mapping[Split, Dataset]
    prompts: int
    stages: Mapping[str, Rows]


def announce_rows(plan: Plan) -> None:
    """Read every split that the run will need, and say how many rows there are for the models that are missing.

    Raises:
        DataError, ConfigError: as `read_rows`.
    """
    for stage, rows in read_rows(plan).stages.items():
        log.info("%s: %s", NAMES[stage], rows)


def read_if_missing(plan: Plan) -> RowsRead | None:
    """In a dry run, the rows as the run would read them; None if it is finished or they have to be downloaded first.

    Raises:
        DataError, ConfigError: as `read_rows`.
    """
    if plan.finished() is None and not fetching.data_sets(plan.plain["data"]):
        return read_rows(plan)
    return None


def read_rows(plan: Plan) -> RowsRead:
    """Read every split that the run will need, and try the user's functions on them.

    Raises:
        DataError: a split cannot be read, or has too few rows.
        ConfigError: a stage would be over before its warm-up, or a function of the user's cannot be used.
    """
    trained = {product for product, folder in plan.needed().items() if not cache.known(folder)} - set(plan.taken)
    splits = {split: plan.source.load(split) for split in _needed(plan, trained)}
    grouped = plan.settings.reward.group_prompts and "preference" in splits
    prompts = count_prompts(splits["preference"]) if grouped else 0
    for key in ("scorer.function", "evaluation.gold.function"):
        function = OmegaConf.select(plan.config, key)
        if function and plan.stage in (*METHODS, "evaluate"):
            try_scorer(key, function, plan.source)
    counts = {split: count_rows(rows, split) for split, rows in splits.items()}
    found = {stage: rows_of(plan.settings, plan.source, counts, stage, prompts) for stage in NAMES if stage in trained}
    return RowsRead(splits, prompts, {stage: rows for stage, rows in found.items() if rows})


def _needed(plan: Plan, trained: Set[str]) -> list[Split]:
    """The splits that training these models and then the stage itself will read, of those that the data set has."""
    wanted: list[Split] = []
    if trained & {"sft", "reward_sft", "reward"}:
        wanted += ["sft", "sft_validation"]
    if ("reward" in trained or plan.stage in FROM_COMPARISONS) and not plan.preferences_folder:
        wanted += ["preference", "preference_validation"]
    if plan.stage in METHODS and plan.stage not in FROM_COMPARISONS:
        wanted += ["prompts"]
    if plan.stage in (*METHODS, "evaluate"):
        wanted += ["eval"]
    return [split for split in wanted if split in plan.source.splits]
