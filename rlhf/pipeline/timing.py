"""Estimate how long every stage of a run takes, from timed passes of its model (`rlhf.pipeline.speed`) and its data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from datasets import Dataset

from rlhf.data.records import Split, count_rows, held_out_rows
from rlhf.models.memory import Work
from rlhf.models.roles import MOVING_REFERENCE
from rlhf.models.tokenizing import encode, encode_texts
from rlhf.pipeline.builders import steps_of
from rlhf.pipeline.speed import Speed
from rlhf.policy_settings import BestOfNSettings
from rlhf.settings import JOINED, LoraSettings, RewardSettings, Settings, SFTSettings

SAMPLE = 200  # rows of a split whose tokens are counted


@dataclass(frozen=True)
class Texts:
    """How many rows a split has, and the mean tokens of a prompt and of a response (0 where it has none).

    Of comparisons also `prompts`, as `reward.group_prompts` counts them, and `distinct`, the number of different texts.
    """

    rows: int
    prompt: float
    response: float
    prompts: int = 0
    distinct: int = 0

    @property
    def length(self) -> float:
        """Mean tokens of a prompt with a response."""
        return self.prompt + self.response


def count_texts(rows: Mapping[Split, Dataset], tokenizer: Any, prompts: int = 0) -> dict[Split, Texts]:
    """Count the rows of each split and the tokens of its first ones.

    `prompts` is the number of prompts whose comparisons are trained on together, which have their texts counted too.
    """
    found: dict[Split, Texts] = {}
    for split, whole in rows.items():
        sample = whole.select(range(min(SAMPLE, len(whole))))
        answers = [
            text for key in ("response", "chosen", "rejected") if key in sample.column_names for text in sample[key]
        ]
        asked = [len(ids) for ids in encode(tokenizer, list(sample["prompt"]))]
        responses = [len(ids) + 1 for ids in encode_texts(tokenizer, answers)] or [0]  # and EOS
        found[split] = Texts(count_rows(whole, split), fmean(asked), fmean(responses))
        if split == "preference" and prompts:
            sides = ({*zip(whole["prompt"][:], whole[side][:], strict=True)} for side in ("chosen", "rejected"))
            found[split] = replace(found[split], prompts=prompts, distinct=len(set.union(*sides)))
    return found


class Times:
    """Seconds that the stages of a run take; `answer` is the mean number of tokens of a sampled answer."""

    def __init__(
        self, settings: Settings, speed: Speed, texts: Mapping[Split, Texts], work: Work, pairs: int, answer: float
    ):
        self.settings, self.speed, self.texts, self.work, self.pairs = settings, speed, texts, work, pairs
        self.new = min(answer, settings.generation.max_new_tokens)
        self.prompt = min(texts["prompts"].prompt, settings.model.max_prompt_tokens) if "prompts" in texts else 0

    def stage(self, name: str) -> float:
        """Seconds of sft, preferences, reward, one of the methods, or evaluate."""
        stages = {"sft": self.sft, "preferences": self.preferences, "reward": self.reward, "ppo": self.ppo,
                  "dpo": self.dpo}  # fmt: skip
        if name in ("best_of_n", "expert_iteration"):
            return self.best_of(getattr(self.settings, name))
        return stages.get(name, self.evaluate)()

    def sft(self) -> float:
        """Demonstrations, epoch after epoch."""
        sft, texts = self.settings.sft, self.texts["sft"]
        length = min(texts.length, sft.max_length)
        rows = self._training_rows("sft", "sft_validation", sft.validation_size)
        if sft.packing == JOINED:
            rows, length = int(rows * texts.length / sft.max_length), sft.max_length
        return self._supervised(sft, rows, length, words=True)

    def reward(self) -> float:
        """Both texts of every comparison, or every text of a prompt once."""
        reward = self.settings.reward
        split: Split = "preference" if "preference" in self.texts else "sft"  # of simulated ones it is not known
        texts = self.texts[split]
        rows = self.pairs or self._training_rows(split, "preference_validation", reward.validation_size)
        units, each = (
            (rows, 2.0) if self.pairs or not texts.prompts else (texts.prompts, texts.distinct / texts.prompts)
        )
        return self._supervised(reward, units, min(texts.length, reward.max_length), reward.lm_coef > 0, each)

    def preferences(self) -> float:
        """Two answers to each prompt."""
        return self._answers(2 * self.pairs, min(self.new, self.work.answer_tokens), self.settings.lora)

    def ppo(self) -> float:
        """All steps, each sampled, scored and learned from, and the evaluations between them."""
        settings, ppo, lora = self.settings, self.settings.ppo, self.settings.lora
        rows, length = ppo.rollout_batch_size, round(self.prompt + self.new)
        learn, read = (self._pass(lora, length, learning) for learning in (True, False))
        values, bare = (self._pass(lora, length, learning, words=False) for learning in (True, False))
        captured = settings.generation.engine == "native" and settings.model.dtype == "float32"
        moving = self.work.moving == MOVING_REFERENCE  # a pass of the penalty's reference, beside the SFT model's
        scoring = (not captured) + (settings.divergence.input != "none") + moving
        critic = ppo.value_model != "none"
        frozen = scoring * read + (critic + self.work.reward_model + self.work.members) * bare  # value, rewards
        update = ppo.epochs * (learn + (values if critic and ppo.value_model != "trunk_head" else 0))
        answers = self._answers(rows, self.new, lora)
        if ppo.score_transform == "par":
            answers *= 1 + ppo.reference_answers
        step = answers + rows * length * (frozen + update) + self._mixed()
        if settings.advantages.baseline == "greedy":
            prompts = rows // settings.generation.samples_per_prompt
            step += self._answers(prompts, self.new, lora) + prompts * length * self.work.reward_model * bare
        measured = sum(ppo.evaluates(number) for number in range(ppo.steps + 1))
        return ppo.steps * step + measured * self.evaluate()

    def dpo(self) -> float:
        """All steps, in which policy and reference read both texts, and the evaluations between them."""
        dpo, lora = self.settings.dpo, self.settings.lora
        split: Split = "preference" if "preference" in self.texts else "sft"  # of simulated ones it is not known
        length = max(round(min(self.texts[split].length, dpo.max_length)), 2)
        learn, read = (
            self.speed.per_token(lora, dpo.microbatch_tokens, length, learning, True) for learning in (True, False)
        )
        measured = sum(map(dpo.evaluates, range(dpo.steps + 1)))
        held_out = 2 * dpo.validation_size * length * 2 * read
        return dpo.steps * 2 * dpo.batch_size * length * (learn + read) + measured * (self.evaluate() + held_out)

    def best_of(self, own: BestOfNSettings) -> float:
        """The answers of all rounds, scored, the best of them learnt, and the evaluations between."""
        lora, length = self.settings.lora, max(round(self.prompt + self.new), 2)
        answers = own.rounds * own.prompts_per_round * own.n
        learn, bare = (
            self.speed.per_token(lora, own.microbatch_tokens, length, learning, learning) for learning in (True, False)
        )
        sampling = self._answers(answers, self.new, lora) + answers * length * bare * self.work.reward_model
        measured = sum(map(own.evaluates, range(own.steps + 1)))
        return sampling + own.steps * own.batch_size * length * learn + measured * self.evaluate()

    def evaluate(self) -> float:
        """One evaluation: answers, their scores, and the true KL."""
        evaluation, lora = self.settings.evaluation, self.settings.lora
        new = min(self.new, evaluation.max_new_tokens)
        count = min(evaluation.prompts, self.texts["eval"].rows if "eval" in self.texts else evaluation.prompts)
        length = round(self.prompt + new)
        samples = evaluation.kl_prompts * (1 + evaluation.diversity_samples)
        answers = self._answers(count * evaluation.best_of, new, lora) + self._answers(samples, new, lora)
        read, bare = (self._pass(lora, length, False, words=words) for words in (True, False))
        scores = count * evaluation.best_of * bare * (self.work.reward_model + self.work.members)
        texts = evaluation.demonstrations * self._demonstration(lora)  # the number of other texts is not known
        return answers + length * (scores + 4 * evaluation.kl_prompts * read) + texts

    def _mixed(self) -> float:
        """The texts that are mixed into the updates of one step."""
        ppo, sft = self.settings.ppo, self.settings.sft
        if not ppo.ptx_coef:
            return 0.0
        texts = ppo.epochs * ppo.rollout_batch_size / ppo.minibatch_size * (ppo.ptx_batch_size or ppo.minibatch_size)
        known = "sft" in self.texts and not ppo.ptx_texts  # of other texts the lengths are not known
        length = round(min(self.texts["sft"].length, sft.max_length)) if known else sft.max_length
        return texts * length * self._pass(self.settings.lora, length, True)

    def _demonstration(self, lora: LoraSettings) -> float:
        """A demonstration, read once."""
        sft = self.settings.sft
        length = round(min(self.texts["sft"].length, sft.max_length)) if "sft" in self.texts else sft.max_length
        return length * self._pass(lora, length, False)

    def _training_rows(self, split: Split, validation: Split, size: int) -> int:
        """The rows of a split that are not held out."""
        rows = self.texts[split].rows
        return rows if validation in self.texts else rows - held_out_rows(rows, split, validation, size)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _supervised(
        self, own: SFTSettings | RewardSettings, units: int, length: float, words: bool, each: float = 1
    ) -> float:
        """Training on units of so many texts each, and measuring held-out rows, before and after."""
        tokens = steps_of(own, units) * own.batch_size * each * length
        held_out = own.validation_size * length * (2 if isinstance(own, RewardSettings) else 1)
        learn, read = (
            self.speed.per_token(own.lora, own.microbatch_tokens, max(round(length), 2), learning, words)
            for learning in (True, False)
        )
        return tokens * learn + 2 * held_out * read

    def _pass(self, lora: LoraSettings, length: int, learn: bool, words: bool = True) -> float:
        return self.speed.per_token(lora, self.settings.ppo.microbatch_tokens, max(length, 2), learn, words)

    def _answers(self, count: int, new: float, lora: LoraSettings) -> float:
        """Answering so many prompts, in batches of `generation.batch_size`."""
        rows = min(self.settings.generation.batch_size, count)
        return count / rows * self.speed.answering(lora, rows, max(round(self.prompt), 1), new)
