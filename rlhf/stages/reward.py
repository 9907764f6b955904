"""Reward modelling: a scalar head on the supervised model, trained on pairwise preferences."""

import logging
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Comparison, Demonstration
from rlhf.distributed import collectives
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, concatenate, select, send, unflatten
from rlhf.models.tokenizing import encode_pairs
from rlhf.settings import RewardSettings
from rlhf.stages.pairs import Comparisons, Group, Pair, encode_comparisons
from rlhf.stages.reward_offsets import Key, margins_of, offsets
from rlhf.stages.supervised import SupervisedStage

log = logging.getLogger(__name__)

MOST_SPREAD = 5.0  # of `reward/prompt_spread` without a warning; the main job's reward models have 0.55 to 0.65


def longer_accuracy(rows: Sequence[Comparison]) -> float:
    """The accuracy of always preferring the answer with more characters; a tie counts ½."""
    lengths = [(len(row.chosen), len(row.rejected)) for row in rows]
    return statistics.fmean(0.5 if chosen == rejected else float(chosen > rejected) for chosen, rejected in lengths)


def accuracy_by_kind(
    rows: Sequence[Comparison], margins: Sequence[float], kinds: Sequence[str]
) -> dict[str, dict[str, float]]:
    """For each kind of comparison the number of `pairs`, and the accuracies of the margins and of `length` alone."""
    table: dict[str, dict[str, float]] = {}
    for kind, count in Counter(kinds).most_common():
        places = [place for place, name in enumerate(kinds) if name == kind]
        right = [0.5 if margins[place] == 0 else float(margins[place] > 0) for place in places]
        length = longer_accuracy([rows[place] for place in places])
        table[kind] = {"pairs": count, "accuracy": statistics.fmean(right), "longer_accuracy": length}
    return table


def mean(values: Float[Tensor, "*rows tokens"], mask: Bool[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows"]:
    """The mean over the marked tokens of each row."""
    return (values * mask).sum(-1) / mask.sum(-1)


class RewardModeling(SupervisedStage):
    """−log σ(r(chosen) − r(rejected)), the score read at each text's last token (Stiennon et al. 2020, section 3.4).

    Each text of a batch is read once. With `reward.group_prompts`, all comparisons of a prompt are trained on together
    (Ouyang et al. 2022, section 3.4). There are two auxiliary losses. With `reward.lm_coef` it is the mean negative
    log-likelihood per response token of both texts, in nats. With `reward.token_coef` a score at every response token
    has the same loss, against the other text's last score, which gets no gradient from it (in the spirit of Cobbe et
    al. 2021's token-level verifiers). `reward.length_coef` and `reward.margin_coef` explain part of a preference by the
    lengths of the answers and by the data's margins. `reward.center_coef` times (r(chosen) + r(rejected))² keeps the
    scores of different prompts together (Eisenstein et al. 2023, arXiv 2312.09244): comparisons say nothing about what
    all answers to a prompt have in common, which is otherwise free to drift.

    `roles` needs a role `reward` with a head. On held-out comparisons it logs what `held_out_metrics` says. Chosen and
    rejected go through the model together.
    """

    prefix = "reward"

    def __init__(self, settings: RewardSettings, roles: Roles, tokenizer: PreTrainedTokenizerBase, total_steps: int):
        super().__init__(settings, roles, tokenizer, total_steps)
        self.reward, self.lr_ratio = settings, settings.lora.lr_ratio
        self._scores: list[tuple[int, Tensor]] = []
        self.held_out_margins: list[float] = []
        self.length_coef = 0.0 if settings.length_coef == "auto" else float(settings.length_coef)
        self.data_margins: dict[Key, float] = {}

    def encode(self, rows: Sequence[Comparison]) -> list[Pair]:
        """(chosen, rejected) of each comparison, both as (prompt ids, response ids)."""
        pairs = encode_comparisons(self.tokenizer, rows, self.reward.max_length)
        if self.reward.margin_coef:
            self.data_margins |= margins_of(rows, pairs)
        return pairs

    def collate(self, rows: Sequence[Pair | Group]) -> Comparisons:
        """A batch of comparisons or of groups of them."""
        return Comparisons.of(rows)

    def microbatches(self, batch: Comparisons) -> list[Tensor]:
        """Groups of comparisons; with `group_prompts`, those of a prompt stay together, as they share texts."""
        return batch.passes(self.roles, self.settings.microbatch_tokens, self.reward.group_prompts)

    def count(self, batch: Comparisons) -> int:
        """The number of comparisons, each as often as annotators made it."""
        return int(batch.votes.sum())

    def scores(self, batch: Comparisons) -> Float[Tensor, "pairs 2"]:
        """r(chosen) and r(rejected) of each comparison."""
        scores = self.roles.last_token_scores("reward", batch.texts)
        return scores[send(batch.sides, scores.device)]

    def loss(self, batch: Comparisons) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """−log σ(margin) and the auxiliary losses, summed over the pairs, and how many pairs are ranked correctly."""
        votes = send(batch.votes, self.roles.device)
        if not (self.reward.lm_coef or self.reward.token_coef):
            scores = self.scores(batch)
            return (votes * self._preference_loss(scores, batch)).sum(), _right(votes, scores)
        texts = batch.texts
        needed = texts.targets | texts.predicting
        states = self.roles.states("reward", texts, needed)
        on_host = texts.response_mask
        mask, sides = send(on_host, states.device), send(batch.sides, states.device)
        # 1. The scores that count are those at the last tokens.
        responses = select(states, texts.targets[needed])
        by_token = unflatten(self.roles.heads["reward"](responses), on_host)
        scores = by_token.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)[sides]
        loss = self._preference_loss(scores, batch)
        # 2. A score at every other token already predicts how its text will compare with the other one.
        if self.reward.token_coef:
            others = scores.detach().flip(1)[..., None]
            signs = torch.tensor([1.0, -1.0], device=scores.device)[:, None]
            losses = -F.logsigmoid(signs * (by_token[sides] - others))
            loss = loss + self.reward.token_coef * mean(losses, mask[sides]).mean(1)
        # 3. The language model goes on learning from both texts.
        if self.reward.lm_coef:
            predicting = select(states, texts.predicting[needed])
            logprobs = self.roles.token_stats("reward", predicting, texts.target_ids).logprobs
            nll = mean(-unflatten(logprobs, on_host), mask)
            loss = loss + self.reward.lm_coef * nll[sides].mean(1)
        return (votes * loss).sum(), _right(votes, scores)

    def _preference_loss(self, scores: Float[Tensor, "pairs 2"], batch: Comparisons) -> Float[Tensor, "pairs"]:
        """−log σ(margin), with what explains a preference besides the score, and the penalty on uncentred scores."""
        margins = scores[:, 0] - scores[:, 1]
        if self.length_coef or self.reward.margin_coef:
            margins = margins + send(offsets(self.reward, self.length_coef, self.data_margins, batch), margins.device)
        loss = -F.logsigmoid(margins)
        return loss + self.reward.center_coef * scores.sum(1).square() if self.reward.center_coef else loss

    def training_metrics(self, sums: Mapping[str, Tensor], count: Tensor) -> dict[str, Tensor]:
        """The accuracy on the batch itself."""
        return {"train_accuracy": sums["right"] / count}

    def on_validation_epoch_start(self) -> None:
        """Begin a measurement on the held-out comparisons."""
        self._scores = []

    def validation_step(self, batch: Comparisons, index: int) -> None:
        """Measure a batch of held-out comparisons."""
        if self.has_turn(index):
            self._scores.append((index, self.scores_of(batch).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log the measures of all held-out comparisons; keep their margins, in order."""
        parts = [part for process in collectives.all_gather(self._scores) for part in process]
        scores = torch.cat([part for _, part in sorted(parts, key=itemgetter(0))])
        self.held_out_margins = (scores[:, 0] - scores[:, 1]).tolist()
        self.emit(held_out_metrics(scores), self.steps_done, bar=["reward/accuracy"])

    @torch.no_grad()
    def scores_of(self, batch: Comparisons) -> Float[Tensor, "pairs 2"]:
        """`scores` of a batch of any size, in the order of its pairs."""
        groups = self.microbatches(batch)
        return concatenate([self.scores(batch.rows(rows)) for rows in groups], torch.cat(groups).tolist())

    @torch.no_grad()
    def baseline(self, rows: Sequence[Demonstration]) -> float:
        """Mean score of demonstrations. It is subtracted from every score, so that rewards start near 0."""
        pairs = encode_pairs(
            self.tokenizer, [row.prompt for row in rows], [row.response for row in rows], self.reward.max_length
        )
        total = 0.0
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        for group in self.roles.groups(lengths, self.settings.microbatch_tokens, frozen=True):
            batch = Sequences.from_lists([pairs[i][0] for i in group], [pairs[i][1] for i in group])
            total += float(self.roles.last_token_scores("reward", batch).sum())
        return total / len(pairs)


def held_out_metrics(scores: Float[Tensor, "pairs 2"]) -> dict[str, float]:
    """Measures of held-out comparisons from the scores of chosen and rejected answers.

    `reward/validation_loss` is the mean of −log σ(margin), `reward/accuracy` the share of positive margins (a tie
    counts ½), `reward/margin` their mean, and `reward/prompt_spread` the standard deviation of the comparisons' mean
    scores in units of the margins' root mean square: how much more scores differ between prompts than between answers
    to one. It is absent while all margins are 0, as those of a new head are.
    """
    margins, means = scores[:, 0] - scores[:, 1], scores.double().mean(1)
    typical = float(margins.double().square().mean().sqrt())
    spread = float(means.std(correction=0))
    found = {
        "reward/validation_loss": float(-F.logsigmoid(margins).mean()),
        "reward/accuracy": float(accuracy(margins)),
        "reward/margin": float(margins.mean()),
    }
    return found | ({"reward/prompt_spread": spread / typical} if typical else {})


def warn_of_spread(name: str, metrics: Mapping[str, float]) -> None:
    """Warn of a reward model whose scores say more about prompts than about answers."""
    spread = metrics.get("reward/prompt_spread", 0.0)
    if spread > MOST_SPREAD:
        log.warning(
            "the scores of %s differ %.0f times as much between prompts as between answers to one, so that little of"
            " the reward is about answers; usual cause: comparisons of answers to one prompt leave its level free to"
            " drift; try reward.center_coef=0.001",
            name,
            spread,
        )


def _right(votes: Float[Tensor, "pairs"], scores: Float[Tensor, "pairs 2"]) -> dict[str, Tensor]:
    """How many comparisons are ranked correctly."""
    return {"right": (votes * (scores[:, 0] > scores[:, 1])).sum()}


def accuracy(margins: Float[Tensor, "pairs"]) -> Float[Tensor, ""]:
    """The share of comparisons with a positive margin r(chosen) − r(rejected); equal scores are half right."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean()
