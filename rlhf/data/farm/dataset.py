"""The farm as a data set: six splits, a tokenizer, and the gold utility of any response."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from rlhf.data.farm import judge
from rlhf.data.farm.judge import (
    GOLD,
    Facts,
    analyze,
    count_facts,
    is_preferred,
    perception,
    prefers_first,
)
from rlhf.data.farm.tasks import Task, Tasks
from rlhf.data.farm.tokenizer import word_tokenizer
from rlhf.data.farm.world import World
from rlhf.data.farm.writers import DAVINCI, sample_crowd_worker, write_pair, write_response, write_responses
from rlhf.data.records import SPLITS, VOTES, Split, columns
from rlhf.errors import DataError

GROUPS = ("famous", "known", "obscure")  # the most famous third of the people, the next, the last


class Farm:
    """A miniature AlpacaFarm, generated from a seed: the same on every machine and in any order of loading.

    Demonstrations are written by simulated crowd workers. Comparisons are labelled by a simulated annotator.

    With `fame` above 0 the world has a long tail: demonstrations are mostly about a few famous people, while
    comparisons, prompts and evaluation ask about all people alike. So the SFT model knows the famous by heart, and
    makes up what it has hardly ever read.

    The instructions of `eval` occur in no other split, and those of the validation splits in no training split; people,
    crafts and phrasings occur in all of them (see `Tasks`). `sft`, `preference` and `prompts` draw their instructions
    from the same set, with repetitions, because the world is too small for separate ones.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    concerns: ClassVar[Mapping[str, tuple[Split, ...]]] = {
        "fame": ("sft", "sft_validation"),
        "demonstrations": ("sft",),
        "comparisons": ("preference",),
        "responses": ("preference",),
        "annotations": ("preference",),
        "edit_annotations": ("preference",),
        "held_out_comparisons": ("preference_validation",),
        "label_noise": ("preference",),
        "max_response_tokens": ("preference", "preference_validation"),
        "prompts": ("prompts",),
        "eval_prompts": ("eval",),
    }

    def __init__(
        self,
        *,
        seed: int = 0,
        people: int = 48,
        fame: float = 0.0,
        demonstrations: int = 16000,
        comparisons: int = 8000,
        responses: int = 2,
        annotations: int = 1,
        edit_annotations: int = 1,
        held_out_comparisons: int = 500,
        prompts: int = 2000,
        eval_prompts: int = 200,
        label_noise: float = 0.25,
        max_response_tokens: int = 48,
    ) -> None:
        """Generate the world; the rows of a split are generated when it is first loaded.

        Args:
            seed: Selects the world and the rows; unrelated to the seeds of training.
            people: Number of people, 2 to 144. Each has eight attributes, which a model has to memorise.
            fame: Demonstrations are about the person at rank k with a weight of 1 / k^`fame`. With 0 all are alike.
            demonstrations: Number of rows of `sft`.
            comparisons: Number of pairs of responses that `preference` compares.
            responses: Number of responses to a prompt of `preference`, 2 to 16, every pair of which is compared. With
                more than 2, every second response is an edit of the one before.
            annotations: Number of annotators who compare each pair of `preference`. With several, a row is a verdict
                on a pair with its `votes`, and all prompts have all of their pairs.
            edit_annotations: Number who compare a response with the edit of it, if more; 1 if `responses` is 2.
            held_out_comparisons: Number of rows of `preference_validation`.
            prompts: Number of rows of `prompts`.
            eval_prompts: Number of rows of `eval`, all of them different.
            label_noise: Probability that the label of a comparison in `preference` is flipped. Labels in
                `preference_validation` are never flipped, so that accuracy on it needs no correction.
            max_response_tokens: Length to which the responses of comparisons are truncated, in tokens.

        Raises:
            ValueError: `people`, `fame`, `responses`, `annotations` or `edit_annotations` is out of range.
        """
        _check(responses, annotations, edit_annotations)
        self.seed, self.world = seed, World(seed, people)
        self.tasks = Tasks(self.world, seed, fame)
        self.responses, self.annotations, self.edit_annotations = responses, annotations, edit_annotations
        self.label_noise, self.max_response_tokens = label_noise, max_response_tokens
        self.sizes: dict[Split, int] = {
            "sft": demonstrations, "sft_validation": 400, "preference": comparisons,
            "preference_validation": held_out_comparisons, "prompts": prompts, "eval": eval_prompts,
        }  # fmt: skip
        self._loaded: dict[Split, Dataset] = {}  # a run asks for a split several times

    @property
    def groups(self) -> tuple[str, ...]:
        """The values of `group`; none if demonstrations are about all people alike."""
        return GROUPS if self.tasks.fame else ()

    def check(self) -> None:
        """Raise `DataError` if comparisons are cut so short that responses do not differ."""
        _, tasks = self._tasks("preference_validation")
        for task in tasks[:1]:
            list(self._comparisons(task, Random(0)))

    def load(self, split: Split) -> Dataset:
        """The rows of `split`; see `DataSource.load`.

        Raises:
            DataError: there is no such split, its size is below 1, or `eval` needs more instructions than there are.
        """
        if split not in self.sizes:
            raise DataError(f"the farm has no split {split!r}; allowed: {', '.join(self.splits)}")
        if self.sizes[split] < 1:
            raise DataError(f"the split {split!r} of the farm is empty: its configured size is {self.sizes[split]}")
        if split not in self._loaded:
            voted = split == "preference" and self._several
            rows = self._rows(split) if voted else itertools.islice(self._rows(split), self.sizes[split])
            names = columns(split) + [VOTES] * voted
            self._loaded[split] = Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
        return self._loaded[split]

    def probes(self) -> list[tuple[str, str, str]]:
        """Every true fact of the world: a prompt, the beginning of an answer, and the value that completes it."""
        tasks = {task.subject: task for task in self.tasks.by_instruction.values() if task.kind in ("bio", "how-to")}
        found = []
        for subject, task in tasks.items():
            for name, value in subject.truth.items():
                clause = self.world.attribute(subject, name).clauses(value)[0]
                found.append((task.prompt, f"{subject.opening} {clause.removesuffix(value)}".strip(), value))
        return found

    @property
    def _several(self) -> bool:
        """Whether several annotators compare a pair."""
        return max(self.annotations, self.edit_annotations) > 1

    def _rows(self, split: Split) -> Iterator[tuple[Any, ...]]:
        """The fields of each record of `split`, in the order of its columns."""
        rng, tasks = self._tasks(split)
        for task in tasks:
            if split in ("sft", "sft_validation"):
                yield task.prompt, write_response(self.world, task, sample_crowd_worker(rng), rng)
            elif split == "preference" and self._several:
                yield from ((*verdict, votes) for verdict, votes in Counter(self._comparisons(task, rng)).items())
            elif split == "preference":
                yield from self._comparisons(task, rng)
            elif split == "preference_validation":
                yield self._held_out(task, rng)[:3]
            else:
                yield task.prompt, self.reference(task.prompt) if split == "eval" else "", task.instruction

    def _comparisons(self, task: Task, rng: Random) -> Iterator[tuple[str, str, str]]:
        """Every pair of some responses to a task, for each of its annotators, in random order, with noisy labels."""
        edits: list[tuple[int, int]] = []
        if self.responses == 2:
            texts = list(write_pair(self.world, task, self.max_response_tokens, rng)[:2])
        else:
            texts, edits = write_responses(self.world, task, self.responses, self.max_response_tokens, rng)
        perceived = [perception(task, analyze(self.world, task, text)) for text in texts]
        pairs = list(itertools.combinations(range(len(texts)), 2)) * self.annotations
        for _ in range(self.edit_annotations - self.annotations):
            pairs += edits
        rng.shuffle(pairs)
        for pair in pairs:
            first_is_chosen = is_preferred(perceived[pair[0]](rng), perceived[pair[1]](rng), rng)
            first_is_chosen ^= rng.random() < self.label_noise
            chosen, rejected = pair if first_is_chosen else pair[::-1]
            yield task.prompt, texts[chosen], texts[rejected]

    def _held_out(self, task: Task, rng: Random) -> tuple[str, str, str, str]:
        """One comparison for validation: prompt, chosen, rejected and kind. Its label is never flipped."""
        first, second, kind = write_pair(self.world, task, self.max_response_tokens, rng)
        ours, theirs = analyze(self.world, task, first), analyze(self.world, task, second)
        first_is_chosen = prefers_first(task, ours, theirs, rng)
        rng.random()  # in `preference`, whether the label is flipped
        return task.prompt, *((first, second) if first_is_chosen else (second, first)), kind

    def kinds(self) -> list[str]:
        """How the two responses of each row of `preference_validation` differ (see `Pair`)."""
        rng, tasks = self._tasks("preference_validation")
        return [self._held_out(task, rng)[3] for task in tasks]

    def _tasks(self, split: Split) -> tuple[Random, list[Task]]:
        """The random stream of a split, and the tasks that its rows are about."""
        # Each split has its own random stream, so that its rows do not depend on which other splits were loaded.
        rng, size = Random(f"{self.seed}/{split}"), self.sizes[split]
        if split == "eval":
            return rng, self.tasks.sample_distinct(split, rng, size)
        part = "validation" if split.endswith("validation") else "train"
        if split == "preference":
            size = math.ceil(size / math.comb(self.responses, 2))
        return rng, self.tasks.sample(part, rng, size, by_fame=split in ("sft", "sft_validation"))

    def _task(self, prompt: str) -> Task:
        """The task of a prompt, with or without the template.

        Raises:
            DataError: no task has this prompt.
        """
        try:
            return self.tasks.by_instruction[prompt.strip()]
        except KeyError:
            raise DataError(f"the farm has no task with this prompt, so it cannot be judged: {prompt!r}") from None

    def reference(self, prompt: str) -> str:
        """The response of the reference writer "davinci"; deterministic for each prompt.

        Raises:
            DataError: no task has this prompt.
        """
        task = self._task(prompt)
        return write_response(self.world, task, DAVINCI, Random(f"{self.seed}/reference/{task.instruction}"))

    def utility(self, prompt: str, response: str) -> float:
        """The gold utility of any text as a response: every fact is checked, and nothing is random.

        Raises:
            DataError: no task has this prompt.
        """
        task = self._task(prompt)
        return judge.utility(task, analyze(self.world, task, response), GOLD)

    def facts(self, prompt: str, response: str) -> Facts:
        """The number of different facts that the response states about the task's subject, and of true ones among them.

        Raises:
            DataError: no task has this prompt.
        """
        task = self._task(prompt)
        return count_facts(task, analyze(self.world, task, response))

    def group(self, prompt: str) -> str:
        """The third of the people that the prompt is about, by fame: `famous`, `known` or `obscure`.

        It is "" for a craft, and for everybody if demonstrations are about all people alike (`fame` 0).

        Raises:
            DataError: no task has this prompt.
        """
        rank = self.tasks.rank.get(self._task(prompt).subject)
        return "" if rank is None or not self.groups else GROUPS[(rank - 1) * len(GROUPS) // len(self.world.people)]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word-level tokenizer whose vocabulary covers every text of this world."""
        world = self.world
        texts = [*self.tasks.by_instruction, *(f"{clause} and ." for clause in world.clauses)]
        texts += [f"{subject.opening} {subject.continuation} \n" for subject in world.people + world.crafts]
        return word_tokenizer(texts)


def _check(responses: int, annotations: int, edit_annotations: int) -> None:
    """Raise `ValueError` unless so many responses can be compared by so many annotators."""
    if not 2 <= responses <= 16:
        raise ValueError(f"responses={responses} is not allowed; allowed: 2 to 16")
    if annotations < 1:
        raise ValueError(f"annotations={annotations} is not allowed; allowed: a number above 0")
    if edit_annotations < 1 or (edit_annotations > 1 and responses == 2):
        raise ValueError(
            f"edit_annotations={edit_annotations} with responses={responses} is not allowed; allowed: 1, or more if"
            " there are more than 2 responses to a prompt (data=farm_groups)"
        )
