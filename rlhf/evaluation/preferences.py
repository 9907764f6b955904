"""`preferences=simulated`: a judge compares answers of the SFT model, and a share of its labels is flipped.

After AlpacaFarm (Dubois et al. 2023): pairs of samples, annotators of any kind, and 25 % label noise, by which they
disagree as much as people do.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import hydra
import torch

from rlhf.data.records import DataSource, Prompt, SampledComparison, Split
from rlhf.data.saved_preferences import PREFERENCE_SPLITS
from rlhf.data.templates import Template
from rlhf.errors import ConfigError, DataError
from rlhf.evaluation.client import uniform
from rlhf.evaluation.evaluate import Judge
from rlhf.evaluation.judges import NoJudge
from rlhf.evaluation.prompts import bare_instruction
from rlhf.files import aside, read_json, write_json
from rlhf.models.tokenizing import Response
from rlhf.rollout.sample import Rollouts
from rlhf.schema import choice, fraction, optional_positive, positive, seed, typed
from rlhf.seeding import generator

log = logging.getLogger(__name__)
PAIRS_AT_ONCE = 512  # sampled together, and kept should the process die
HELD_OUT: dict[str, Split] = {"preference": "preference_validation", "sft": "sft_validation"}
Answer = Callable[[list[str], int], Rollouts]
"""Answers prompts; the number says which stream of random numbers to draw from."""


@dataclass
class SimulationSettings:
    """`conf/preferences/simulated.yaml` says what each key means."""

    split: str = choice("preference", "prompts", "sft")
    pairs: int | None = optional_positive()
    validation_pairs: int = positive()
    temperature: float = positive(1.0)
    max_new_tokens: int = positive()
    flip: float = fraction(0.25)
    ties: str = choice("drop", "random")
    seed: int = seed()


class FromData:
    """The comparisons of the data set; nothing is made."""

    simulated: ClassVar[bool] = False


@dataclass(frozen=True)
class Annotated:
    """A pair of answers and what became of it.

    `outcome` is the judge's: 1 if `first` is better, 0 if `second`, ½ for a tie, None without a verdict. A pair that is
    `dropped` (`identical`, `unjudged` or a `tie`) is no comparison; of the others `preferred` names the answer that
    the label prefers, which is the worse one where the label was `flipped`.
    """

    prompt: str
    first: str
    second: str
    outcome: float | None = None
    dropped: str | None = None
    preferred: str | None = None
    flipped: bool = False

    @property
    def comparison(self) -> SampledComparison:
        """What the reward model learns from it."""
        texts = (self.first, self.second) if self.preferred == "first" else (self.second, self.first)
        return SampledComparison(self.prompt, *texts, *(getattr(text, "ended", True) for text in texts))


class Simulated:
    """Comparisons that are made: which prompts are asked, and what is made of the judge's verdicts.

    All that is random is a hash of (seed, purpose, index) or a stream seeded by one: the same settings, model and judge
    give the same comparisons, however often the making was broken off.

    Raises:
        ConfigError: a key that does not exist, or a value that is not allowed.
    """

    simulated: ClassVar[bool] = True

    def __init__(self, judge: Any = None, **keys: Any):
        if not isinstance(judge, Mapping) or not judge.get("_target_"):
            raise ConfigError(f"preferences.judge={judge} has no _target_; allowed: an option of the group judge")
        self.judge = dict(judge)
        self.settings = typed(SimulationSettings, keys, "preferences.")

    def check(self, splits: Sequence[Split]) -> None:
        """See whether there are prompts to answer and somebody to compare the answers.

        Raises:
            ConfigError: the data set has no such split, or the judge never compares.
        """
        if self.settings.split not in splits:
            having = [split for split in ("preference", "prompts", "sft") if split in splits]
            raise ConfigError(
                f"preferences.split={self.settings.split}, but the data set has no such split; "
                f"allowed: {' or '.join(having) or 'another data set'}"
            )
        if hydra.utils.get_object(self.judge["_target_"]) is NoJudge:
            raise ConfigError("preferences.judge=none compares nothing; allowed: any other judge, such as llm_pool")

    def prepare(self, source: DataSource, template: Template | None) -> None:
        """See, before the model that answers is made, whether prompts, annotators and their endpoint are there.

        Raises:
            ConfigError: the judge says what it lacks.
            DataError: there are too few prompts.
        """
        annotator = hydra.utils.get_object(self.judge["_target_"])
        for look in ("check", "ping"):
            if hasattr(annotator, look):
                with _under_its_own_name():
                    getattr(annotator, look)(self.judge)
        self.questions(source, template)

    def questions(self, source: DataSource, template: Template | None) -> dict[Split, list[Prompt]]:
        """What is asked for training and to be held out, in a random order.

        The held-out prompts are those of the data set's own validation split, or occur in no other pair. Beyond the end
        of a split it begins again. `template` tells what judges read as the instruction where the split does not.

        Raises:
            DataError: there are too few prompts.
        """
        settings, split = self.settings, self.settings.split
        train = self._shuffled(source, split, template)  # type: ignore[arg-type]
        own = HELD_OUT.get(split)
        if own in source.splits:
            held_out = self._shuffled(source, own, template)
        else:
            distinct = list({row.prompt: row for row in train}.values())
            if len(distinct) <= settings.validation_pairs:
                raise DataError(
                    f"the split {split} has {len(distinct)} different prompts, "
                    f"too few to hold out preferences.validation_pairs={settings.validation_pairs}"
                )
            held_out = distinct[: settings.validation_pairs]
            kept = {row.prompt for row in held_out}
            train = [row for row in train if row.prompt not in kept]
        pairs = settings.pairs or len(train)
        asked = [train[i % len(train)] for i in range(pairs)]
        return dict(zip(PREFERENCE_SPLITS, (asked, held_out[: settings.validation_pairs]), strict=True))

    def _shuffled(self, source: DataSource, split: Split, template: Template | None) -> list[Prompt]:
        rows = source.load(split)
        order = torch.randperm(len(rows), generator=generator(self.settings.seed, "preference prompts")).tolist()
        known = rows["instruction"] if "instruction" in rows.column_names else [""] * len(rows)
        prompts = list(zip(rows["prompt"], known, strict=True))
        return [
            Prompt(prompt, instruction=instruction or bare_instruction(prompt, template))
            for prompt, instruction in (prompts[i] for i in order)
        ]

    def make(
        self, folder: Path, questions: Mapping[Split, Sequence[Prompt]], answer: Answer, hire: Callable[[], Judge]
    ) -> dict[str, float]:
        """Sample, have compared (by the judge that `hire` then makes), flip; the counts.

        `folder` gets `preference.jsonl` and `preference_validation.jsonl` (prompt, chosen, rejected) and, for each,
        `…_pairs.jsonl`, all that was asked. Labels are flipped in the former only, so that an accuracy on held-out
        comparisons reads plainly.

        Raises:
            DataError: not a single comparison came out.
            ConfigError, Interrupted: the judge's; the same call continues.
        """
        metrics: dict[str, float] = {}
        asked = [(split, row) for split in PREFERENCE_SPLITS for row in questions[split]]
        pairs, cut = self._sample(folder, [row for _, row in asked], answer)
        with _under_its_own_name():
            judge = hire()
            outcomes = _judge([row for _, row in asked], pairs, judge)
        for split in PREFERENCE_SPLITS:
            places = [i for i, (whose, _) in enumerate(asked) if whose == split]
            noise = self.settings.flip if split == "preference" else 0.0
            found = [
                self.annotated(f"{split}/{number}", asked[i][1].prompt, *pairs[i], outcomes[i], noise)
                for number, i in enumerate(places)
            ]
            counted = counts(found)
            if not counted["comparisons"]:
                raise DataError(f"{split}: none of the simulated preferences can be used ({counted})")
            _write_lines(folder / f"{split}_pairs.jsonl", map(asdict, found))
            _write_lines(folder / f"{split}.jsonl", (asdict(row.comparison) for row in found if not row.dropped))
            told = counted if split == "preference" else {"validation_comparisons": counted["comparisons"]}
            metrics |= {f"preferences/{name}": number for name, number in told.items()}
        metrics["preferences/cut"] = cut / (2 * len(pairs))
        shutil.rmtree(folder / "samples")
        return metrics | getattr(judge, "report", {})

    def _sample(self, folder: Path, asked: Sequence[Prompt], answer: Answer) -> tuple[list[tuple[str, str]], int]:
        """Two answers to each prompt, and how many answers were cut off; a part that is there is not made again."""
        parts: list[dict[str, Any]] = []
        (folder / "samples").mkdir(exist_ok=True)
        for start in range(0, len(asked), PAIRS_AT_ONCE):
            path = folder / "samples" / f"{start:08d}.json"
            if not path.exists():
                prompts = [row.prompt for row in asked[start : start + PAIRS_AT_ONCE] for _ in range(2)]
                answers = answer(prompts, start // PAIRS_AT_ONCE)
                ended = answers.ended.tolist()
                told = [
                    (str(text), getattr(text, "ids", ()), end)
                    for text, end in zip(answers.responses, ended, strict=True)
                ]
                write_json(path, {"answers": told, "cut": int((~answers.ended).sum())})
                log.info("%d of %d pairs sampled", min(start + PAIRS_AT_ONCE, len(asked)), len(asked))
            parts.append(read_json(path))
        texts = [Response(*told) for part in parts for told in part["answers"]]
        return list(zip(texts[::2], texts[1::2], strict=True)), sum(part["cut"] for part in parts)

    def annotated(
        self, index: str, prompt: str, first: str, second: str, outcome: float | None, noise: float
    ) -> Annotated:
        """The label of a pair, flipped with probability `noise`; `index` is what its random numbers depend on."""
        pair = Annotated(prompt, first, second, outcome)
        if first == second:
            return replace(pair, dropped="identical")
        if outcome is None:
            return replace(pair, dropped="unjudged")
        if outcome == 0.5 and self.settings.ties == "drop":
            return replace(pair, dropped="tie")
        first_is_better = outcome > 0.5 or (outcome == 0.5 and uniform(self.settings.seed, "tie", index) < 0.5)
        flipped = uniform(self.settings.seed, "flip", index) < noise
        return replace(pair, preferred="first" if first_is_better != flipped else "second", flipped=flipped)


@contextmanager
def _under_its_own_name() -> Iterator[None]:
    """A judge takes itself for that of the evaluation and names its keys so."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"(^|\s)judge\.", r"\1preferences.judge.", str(error))) from None


def _judge(asked: Sequence[Prompt], pairs: Sequence[tuple[str, str]], judge: Judge) -> list[float | None]:
    """The outcome of each pair, the second answer being the reference; nobody is asked about equal ones."""
    different = [i for i, (first, second) in enumerate(pairs) if first != second]
    found: list[float | None] = [None] * len(pairs)
    if different:
        rows = [replace(asked[i], reference_output=pairs[i][1]) for i in different]
        for i, outcome in zip(different, judge(rows, [pairs[i][0] for i in different]), strict=True):
            found[i] = outcome
    return found


def counts(rows: Sequence[Annotated]) -> dict[str, int]:
    """What became of the pairs: those that are `identical`, `unjudged` or dropped as `ties` are no `comparisons`."""
    dropped = [row.dropped for row in rows]
    return {
        "pairs": len(rows),
        "identical": dropped.count("identical"),
        "unjudged": dropped.count("unjudged"),
        "ties": sum(row.outcome == 0.5 for row in rows),
        "flipped": sum(row.flipped for row in rows),
        "comparisons": dropped.count(None),
    }


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with aside(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
