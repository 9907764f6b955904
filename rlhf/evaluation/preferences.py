"""`preferences=simulated`: a judge compares pairs of the SFT model's answers, and a share of its labels is flipped.

Follows AlpacaFarm (Dubois et al. 2023), whose annotators disagree as much as people do with 25 % label noise. Any judge
can be the annotator, except the reward model that is to be trained on its labels.
"""

import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import hydra
import torch

from rlhf.data.records import DataSource, Prompt, Split
from rlhf.data.saved_preferences import PREFERENCE_SPLITS
from rlhf.data.templates import PromptTemplate
from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.client import uniform_from_hash
from rlhf.evaluation.evaluator import Judge
from rlhf.evaluation.judges import NoJudge
from rlhf.evaluation.labelled_pairs import LabelledPair, count_labels
from rlhf.evaluation.prompts import strip_template
from rlhf.files import read_json, write_json, write_lines
from rlhf.models.tokenizing import Response
from rlhf.rollout.sample import Rollouts
from rlhf.schema import choice, fraction, optional_positive, positive, seed, typed
from rlhf.seeding import generator

log = logging.getLogger(__name__)
PAIRS_PER_PART = 512  # sampled and saved together, so that a killed process loses at most one part
VALIDATION_SPLITS: dict[str, Split] = {"preference": "preference_validation", "sft": "sft_validation"}
Answer = Callable[[list[str], int], Rollouts]
"""Samples answers to prompts. The number selects the stream of random numbers."""


@dataclass
class SimulationSettings:
    """The keys of `preferences`, documented in `conf/preferences/simulated.yaml`."""

    split: str = choice("preference", "prompts", "sft")
    pairs: int | None = optional_positive()
    validation_pairs: int = positive()
    temperature: float = positive(1.0)
    max_new_tokens: int = positive()
    flip: float = fraction(0.25)
    ties: str = choice("drop", "random")
    seed: int = seed()


class FromData:
    """`preferences=from_data`: the reward model learns from the comparisons of the data set."""

    simulated: ClassVar[bool] = False


class Simulated:
    """Simulates comparisons: draws prompts, has two answers to each compared, and adds label noise.

    All random numbers come from a hash of (seed, purpose, index), or from a generator seeded with one. The same
    settings, model and judge therefore give the same comparisons, even if the simulation is interrupted and continued.

    Args:
        judge: The configuration of the annotator, with `_target_`.
        keys: The keys of `SimulationSettings`.

    Raises:
        ConfigError: A key does not exist, or has a value that is not allowed.
    """

    simulated: ClassVar[bool] = True

    def __init__(self, judge: Any = None, **keys: Any):
        if not isinstance(judge, Mapping) or not judge.get("_target_"):
            raise ConfigError(f"preferences.judge={judge} has no _target_; allowed: an option of the group judge")
        self.judge = dict(judge)
        self.settings = typed(SimulationSettings, keys, "preferences.")

    def check(self, splits: Sequence[Split]) -> None:
        """Check that the data set has the prompts' split, and that the judge compares answers.

        Raises:
            ConfigError: It has no such split, or the judge is `none`.
        """
        if self.settings.split not in splits:
            available = [split for split in ("preference", "prompts", "sft") if split in splits]
            raise ConfigError(
                f"preferences.split={self.settings.split}, but the data set has no such split; "
                f"allowed: {' or '.join(available) or 'another data set'}"
            )
        if hydra.utils.get_object(self.judge["_target_"]) is NoJudge:
            raise ConfigError("preferences.judge=none compares nothing; allowed: any other judge, such as llm_pool")

    def prepare(self, source: DataSource, template: PromptTemplate | None) -> None:
        """Check the judge, its endpoint and the prompts before any model is loaded.

        Raises:
            ConfigError: The judge's check failed.
            DataError: There are too few prompts.
        """
        annotator = hydra.utils.get_object(self.judge["_target_"])
        for method in ("check", "ping"):
            if hasattr(annotator, method):
                with _judge_key_renamed():
                    getattr(annotator, method)(self.judge)
        self.draw_prompts(source, template)

    def draw_prompts(self, source: DataSource, template: PromptTemplate | None) -> dict[Split, list[Prompt]]:
        """Draw the prompts of the training and of the held-out pairs, in random order.

        The held-out prompts come from the data set's own validation split, if there is one. Otherwise they are taken
        from the training split, and no training pair has one of them. If there are fewer training prompts than pairs,
        they are repeated from the start.

        Args:
            source: The data set.
            template: Its template, which is removed from prompts without an `instruction` so that judges can read them.

        Raises:
            DataError: There are too few prompts.
        """
        settings, split = self.settings, self.settings.split
        train = self._shuffled_prompts(source, split, template)  # type: ignore[arg-type]
        validation = VALIDATION_SPLITS.get(split)
        if validation in source.splits:
            held_out = self._shuffled_prompts(source, validation, template)
        else:
            distinct = list({row.prompt: row for row in train}.values())
            if len(distinct) <= settings.validation_pairs:
                raise DataError(
                    f"the split {split} has {len(distinct)} different prompts, "
                    f"too few to hold out preferences.validation_pairs={settings.validation_pairs}"
                )
            held_out = distinct[: settings.validation_pairs]
            held_out_prompts = {row.prompt for row in held_out}
            train = [row for row in train if row.prompt not in held_out_prompts]
        pairs = settings.pairs or len(train)
        repeated = [train[i % len(train)] for i in range(pairs)]
        return dict(zip(PREFERENCE_SPLITS, (repeated, held_out[: settings.validation_pairs]), strict=True))

    def _shuffled_prompts(self, source: DataSource, split: Split, template: PromptTemplate | None) -> list[Prompt]:
        rows = source.load(split)
        instructions = rows["instruction"] if "instruction" in rows.column_names else [""] * len(rows)
        # consecutive comparisons of one prompt ask it once
        prompts = [asked for asked, _ in itertools.groupby(zip(rows["prompt"], instructions, strict=True))]
        order = torch.randperm(len(prompts), generator=generator(self.settings.seed, "preference prompts")).tolist()
        return [
            Prompt(prompt, instruction=instruction or strip_template(prompt, template))
            for prompt, instruction in (prompts[i] for i in order)
        ]

    def make(
        self, folder: Path, prompts: Mapping[Split, Sequence[Prompt]], answer: Answer, make_judge: Callable[[], Judge]
    ) -> dict[str, float]:
        """Sample answers, judge them, flip labels and write the comparisons. An interrupted call can be repeated.

        Writes `preference.jsonl` and `preference_validation.jsonl`, which hold the comparisons, and for each of them
        `…_pairs.jsonl`, which holds all pairs. Held-out labels are not flipped, so that the reward model's accuracy
        measures its agreement with the judge and not with the noise.

        Args:
            folder: Where to write the files.
            prompts: The result of `draw_prompts`.
            answer: Samples answers of the SFT model.
            make_judge: Makes the judge. Called once all answers are sampled.

        Returns:
            Counts and shares as metrics `preferences/*`, and the judge's own metrics.

        Raises:
            DataError: Not a single pair can be used.
            ConfigError: The judge cannot be used.
            Interrupted: The judge's endpoint cannot be reached.
        """
        metrics: dict[str, float] = {}
        # 1. Sample and judge the pairs of both splits together.
        asked = [(split, row) for split in PREFERENCE_SPLITS for row in prompts[split]]
        pairs, truncated = self._sample_pairs(folder, [row for _, row in asked], answer)
        with _judge_key_renamed():
            judge = make_judge()
            outcomes = _judge_pairs([row for _, row in asked], pairs, judge)
        # 2. Label and write the pairs of each split.
        for split in PREFERENCE_SPLITS:
            indices = [i for i, (own_split, _) in enumerate(asked) if own_split == split]
            noise = self.settings.flip if split == "preference" else 0.0
            labelled = [
                self.label(f"{split}/{number}", asked[i][1].prompt, *pairs[i], outcomes[i], noise)
                for number, i in enumerate(indices)
            ]
            counts = _save_pairs(folder, split, labelled)
            logged = counts if split == "preference" else {"validation_comparisons": counts["comparisons"]}
            metrics |= {f"preferences/{name}": number for name, number in logged.items()}
        metrics["preferences/cut"] = truncated / (2 * len(pairs))
        # 3. The samples are no longer needed to continue.
        shutil.rmtree(folder / "samples")
        return metrics | getattr(judge, "report", {})

    def _sample_pairs(
        self, folder: Path, prompts: Sequence[Prompt], answer: Answer
    ) -> tuple[list[tuple[str, str]], int]:
        """Sample two answers to each prompt, in parts that are saved and not sampled again.

        Returns:
            The pairs, and how many answers were truncated.
        """
        parts: list[dict[str, Any]] = []
        (folder / "samples").mkdir(exist_ok=True)
        for start in range(0, len(prompts), PAIRS_PER_PART):
            path = folder / "samples" / f"{start:08d}.json"
            if not path.exists():
                repeated = [row.prompt for row in prompts[start : start + PAIRS_PER_PART] for _ in range(2)]
                answers = answer(repeated, start // PAIRS_PER_PART)
                ended = answers.ended.tolist()
                rows = [
                    (str(text), getattr(text, "ids", ()), end)
                    for text, end in zip(answers.responses, ended, strict=True)
                ]
                write_json(path, {"answers": rows, "cut": int((~answers.ended).sum())})
                log.info("%d of %d pairs sampled", min(start + PAIRS_PER_PART, len(prompts)), len(prompts))
            parts.append(read_json(path))
        texts = [Response(*row) for part in parts for row in part["answers"]]
        return list(zip(texts[::2], texts[1::2], strict=True)), sum(part["cut"] for part in parts)

    def label(
        self, index: str, prompt: str, first: str, second: str, outcome: float | None, noise: float
    ) -> LabelledPair:
        """Label a pair according to the judge's `outcome`; the label is flipped with probability `noise`.

        The pair's random numbers depend on `index` and the seed alone.
        """
        pair = LabelledPair(prompt, first, second, outcome)
        if first == second:
            return replace(pair, dropped="identical")
        if outcome is None:
            return replace(pair, dropped="unjudged")
        if outcome == 0.5 and self.settings.ties == "drop":
            return replace(pair, dropped="tie")
        first_is_better = outcome > 0.5 or (
            outcome == 0.5 and uniform_from_hash(self.settings.seed, "tie", index) < 0.5
        )
        flipped = uniform_from_hash(self.settings.seed, "flip", index) < noise
        return replace(pair, preferred="first" if first_is_better != flipped else "second", flipped=flipped)


@contextmanager
def _judge_key_renamed() -> Iterator[None]:
    """Name the keys of `preferences.judge` correctly in error messages, where a judge calls them `judge.*`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"(^|\s)judge\.", r"\1preferences.judge.", str(error))) from None


def _judge_pairs(prompts: Sequence[Prompt], pairs: Sequence[tuple[str, str]], judge: Judge) -> list[float | None]:
    """Return the outcome of each pair, with the second answer as the reference. Identical answers are not judged."""
    different = [i for i, (first, second) in enumerate(pairs) if first != second]
    outcomes: list[float | None] = [None] * len(pairs)
    if different:
        rows = [replace(prompts[i], reference_output=pairs[i][1]) for i in different]
        for i, outcome in zip(different, judge(rows, [pairs[i][0] for i in different]), strict=True):
            outcomes[i] = outcome
    return outcomes


def _save_pairs(folder: Path, split: Split, labelled: Sequence[LabelledPair]) -> dict[str, int]:
    """Write the pairs and the comparisons of a split, and return their counts.

    Raises:
        DataError: There is no comparison.
    """
    counts = count_labels(labelled)
    if not counts["comparisons"]:
        raise DataError(f"{split}: none of the simulated preferences can be used ({counts})")
    write_lines(folder / f"{split}_pairs.jsonl", map(asdict, labelled))
    write_lines(folder / f"{split}.jsonl", (asdict(row.comparison) for row in labelled if not row.dropped))
    return counts
