"""Best-of-n distillation and expert iteration: the policy imitates the best of several answers to each prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.distributed import collectives
from rlhf.errors import DamagedError
from rlhf.files import ANSWERS, read_lines, tidy, write_lines
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.policy_settings import BestOfNSettings
from rlhf.rollout.sample import rollout
from rlhf.settings import Settings
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.cutting import Encoded
from rlhf.stages.evaluation import Evaluator, Scorer
from rlhf.stages.passes import logprobs_of
from rlhf.stages.supervised_policy import SupervisedPolicy

CHUNK = 64  # prompts that share a random stream, so that neither processes nor batch size decide what is sampled


@dataclass(frozen=True)
class BestAnswer:
    """The best of n answers to a prompt, as ids, and the scores of all n, after the penalty for a missing EOS."""

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    ended: bool
    scores: list[float]


class BestOfN(SupervisedPolicy):
    """Cross-entropy of the best of n answers of the policy itself, by the scorer (AlpacaFarm's Expert Iteration).

    The steps are divided into rounds, one for best-of-n distillation. A round begins with the present policy's answers
    to its prompts, n to each; the best of each n are what its steps learn from. They are kept in `answers/` of the
    run's folder, from which a resumed run reads them.
    """

    prefix = "best_of_n"

    def __init__(
        self,
        config: Settings,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        evaluator: Evaluator,
        samples: Path,
    ):
        self.own: BestOfNSettings = self.settings_in(config)
        super().__init__(config, self.own, roles, tokenizer, scorer, evaluator, samples)
        self.folder = samples.parent / ANSWERS
        self.prompts: list[str] = []
        self._answers: tuple[int, list[BestAnswer]] = (-1, [])

    @staticmethod
    def settings_in(config: Settings) -> BestOfNSettings:
        """The settings of the method."""
        return config.best_of_n

    @property
    def batch_size(self) -> int:
        """Answers of an optimiser step, over all processes."""
        return self.own.batch_size

    def loader(self, rows: Sequence[str], start: int) -> DataLoader:
        """The numbers of a round's answers that are in each batch; `rows` are all prompts."""
        self.prompts = list(rows)
        share = slice(collectives.rank(), None, collectives.size())
        answers, seed = range(self.own.prompts_per_round), self.config.seed
        batches = SeededBatches(len(answers), self.batch_size, seed, self.total_steps, start, share)
        return loader(answers, list, batches)

    def training_step(self, batch: Sequence[int], index: int) -> None:
        """One optimiser step, the first of a round after the sampling of its answers."""
        number, within = divmod(self.steps_done, self.own.steps_per_round)
        answers = self.answers(number)
        if not within:
            self.emit({**self._described(answers), **self.take_timings()}, self.steps_done + 1)
        chosen = [answers[row] for row in batch]
        super().training_step(self.collate([(row.prompt_ids, row.response_ids) for row in chosen]), index)

    # -- what is learnt ------------------------------------------------------------------------------------------------

    def collate(self, rows: list[Encoded]) -> Sequences:
        """A batch of answers."""
        return Sequences.from_lists([prompt for prompt, _ in rows], [response for _, response in rows])

    def count(self, batch: Sequences) -> int:
        """The number of tokens of the answers."""
        return int(batch.response_lengths.sum())

    def loss(self, batch: Sequences) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Negative log-likelihood summed over the tokens of the answers, in nats at the sampling temperature."""
        return -logprobs_of(self.roles, "policy", batch, self.config.generation.temperature).sum(), {}

    # -- the answers of a round ----------------------------------------------------------------------------------------

    def answers(self, number: int) -> list[BestAnswer]:
        """The best answers of round `number`, counted from 0: read if they are there, else sampled and written.

        Raises:
            DamagedError: they are there, but not all.
        """
        if self._answers[0] != number:
            path = self.folder / f"round-{number + 1:03d}.jsonl"
            if not collectives.on_rank_zero(path.exists):
                self.roles.eval()
                with self.timed("generate"):
                    found = self._sampled(number)
                collectives.on_rank_zero(lambda: _keep(path, found))
            self._answers = number, _read(path, self.own.prompts_per_round)
        return self._answers[1]

    def _sampled(self, number: int) -> list[BestAnswer]:
        """The best of n answers to each prompt of a round; the processes take turns."""
        own, seed = self.own, self.config.seed
        order = SeededBatches(len(self.prompts), own.prompts_per_round, seed, own.rounds)
        prompts = [self.prompts[row] for row in order.batch(number)]
        chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
        found = [
            (index, list(self._best_of(chunk, number * len(chunks) + index)))
            for index, chunk in enumerate(chunks)
            if self.has_turn(index)
        ]
        parts = [part for process in collectives.all_gather(found) for part in process]
        return [answer for _, answers in sorted(parts, key=itemgetter(0)) for answer in answers]

    def _best_of(self, prompts: Sequence[str], part: int) -> Iterator[BestAnswer]:
        """The best of n answers to each of these prompts, from a random stream of their own."""
        n, config = self.own.n, self.config.generation
        repeated = [prompt for prompt in prompts for _ in range(n)]
        stream = self.stream("best of n", part)
        rollouts = rollout(self.engine, self.roles, "policy", self.tokenizer, repeated, config, stream)
        with torch.no_grad():
            scores = self.scorer(rollouts) - self.own.missing_eos_penalty * ~rollouts.ended
        best = scores.view(-1, n).argmax(1).cpu() + torch.arange(len(prompts)) * n
        chosen, ended = rollouts.sequences.rows(best), rollouts.ended.cpu()
        by_prompt, lengths = scores.view(-1, n).tolist(), chosen.prompt_lengths.tolist()
        for place, row in enumerate(best.tolist()):
            yield BestAnswer(
                prompts[place],
                str(rollouts.responses[row]),
                chosen.ids[place, : lengths[place]].tolist(),
                chosen.responses()[place],
                bool(ended[row]),
                by_prompt[place],
            )

    def _described(self, answers: Sequence[BestAnswer]) -> dict[str, float]:
        """Metrics of a round's answers."""
        return {
            f"{self.prefix}/score": fmean(max(row.scores) for row in answers),
            f"{self.prefix}/mean_score": fmean(score for row in answers for score in row.scores),
            f"{self.prefix}/response_tokens": fmean(len(row.response_ids) for row in answers),
            f"{self.prefix}/missing_eos": fmean(not row.ended for row in answers),
        }


class ExpertIteration(BestOfN):
    """Best-of-n distillation in several rounds, each from the policy that the last one has left."""

    @staticmethod
    def settings_in(config: Settings) -> BestOfNSettings:
        """The settings of the method."""
        return config.expert_iteration


def _read(path: Path, count: int) -> list[BestAnswer]:
    rows = read_lines(path)
    if len(rows) != count:  # they cannot be sampled again, as the policy has learnt since
        raise DamagedError(
            f"{path} is damaged: it holds {len(rows)} of {count} answers; allowed: resume=never, which starts over"
        )
    return [BestAnswer(**row) for row in rows]


def _keep(path: Path, answers: Sequence[BestAnswer]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tidy(path.parent)  # half a file of a process that was killed
    write_lines(path, map(asdict, answers))
