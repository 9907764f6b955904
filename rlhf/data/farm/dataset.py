"""The farm as a source of data: six splits, a tokenizer and a judge who knows the truth."""

from collections.abc import Mapping
from random import Random
from typing import ClassVar

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from rlhf.data.farm.judge import GOLD, Facts, count_facts, prefers, read, score
from rlhf.data.farm.tasks import Task, Tasks
from rlhf.data.farm.tokenizer import word_tokenizer
from rlhf.data.farm.world import World
from rlhf.data.farm.writers import DAVINCI, crowd, pair, write
from rlhf.data.records import SPLITS, Split, columns
from rlhf.errors import DataError


class Farm:
    """A miniature AlpacaFarm, the same for the same `seed` on every machine, whatever is loaded first.

    `sft` and `sft_validation` are written by crowd workers, `preference` and `preference_validation` compared by a
    simulated annotator, whose choice is flipped with probability `label_noise` in the former only, so that accuracy on
    the latter reads plainly. The instructions of `eval` occur in no other split, those of the validation splits in no
    training split; people, crafts and phrasings are those of training (see `Tasks`). The instructions of `prompts` are
    those of `sft` and `preference`, and some come several times: the world is too small for more.
    """

    splits: ClassVar[tuple[Split, ...]] = SPLITS
    concerns: ClassVar[Mapping[str, tuple[Split, ...]]] = {
        "demonstrations": ("sft",),
        "comparisons": ("preference",),
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
        demonstrations: int = 16000,
        comparisons: int = 8000,
        prompts: int = 2000,
        eval_prompts: int = 200,
        label_noise: float = 0.25,
        max_response_tokens: int = 48,
    ) -> None:
        self.seed = seed
        self.world = World(seed, people)
        self.tasks = Tasks(self.world, seed)
        self.label_noise = label_noise
        self.max_response_tokens = max_response_tokens
        self.sizes: dict[Split, int] = {
            "sft": demonstrations,
            "sft_validation": 400,
            "preference": comparisons,
            "preference_validation": 500,
            "prompts": prompts,
            "eval": eval_prompts,
        }

    def load(self, split: Split) -> Dataset:
        """Rows of `split`; each split has a stream of random numbers of its own."""
        if split not in self.sizes:
            raise DataError(f"the farm has no split {split!r}: its splits are {', '.join(self.splits)}")
        if self.sizes[split] < 1:
            raise DataError(f"the split {split!r} of the farm is empty: its size is configured as {self.sizes[split]}")
        rng = Random(f"{self.seed}/{split}")
        part = "validation" if split.endswith("validation") else "eval" if split == "eval" else "train"
        tasks = (self.tasks.distinct if part == "eval" else self.tasks.draw)(part, rng, self.sizes[split])
        rows = [self._row(split, task, rng) for task in tasks]
        return Dataset.from_dict(dict(zip(columns(split), map(list, zip(*rows, strict=True)), strict=True)))

    def _row(self, split: Split, task: Task, rng: Random) -> tuple[str, ...]:
        """The fields of one record, in the order of its columns."""
        if split in ("sft", "sft_validation"):
            return task.prompt, write(self.world, task, crowd(rng), rng)
        if split in ("preference", "preference_validation"):
            noise = self.label_noise if split == "preference" else 0.0
            first, second = pair(self.world, task, self.max_response_tokens, rng)
            chosen = prefers(self.world, task, first, second, rng) != (rng.random() < noise)
            return (task.prompt, first, second) if chosen else (task.prompt, second, first)
        return task.prompt, self.reference(task.prompt) if split == "eval" else "", task.instruction

    def _task(self, prompt: str) -> Task:
        """The task that a templated prompt or a bare instruction states."""
        try:
            return self.tasks.by_instruction[prompt.strip()]
        except KeyError:
            raise DataError(f"nobody asks this on the farm, so it has no judge for it: {prompt!r}") from None

    def reference(self, prompt: str) -> str:
        """What "davinci", the writer to beat, answers: always the same to the same prompt."""
        task = self._task(prompt)
        return write(self.world, task, DAVINCI, Random(f"{self.seed}/reference/{task.instruction}"))

    def utility(self, prompt: str, response: str) -> float:
        """The gold utility of any text as a response: every fact is checked, nothing is random."""
        task = self._task(prompt)
        return score(task, read(self.world, task, response), GOLD)

    def facts(self, prompt: str, response: str) -> Facts:
        """Different facts that the response states about the subject asked, and how many of them are true."""
        task = self._task(prompt)
        return count_facts(task, read(self.world, task, response))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A word-level tokenizer for every text of this world."""
        world = self.world
        texts = [*self.tasks.by_instruction, *(f"{clause} and ." for clause in world.clauses)]
        texts += [f"{subject.opening} {subject.again} \n" for subject in world.people + world.crafts]
        return word_tokenizer(texts)
