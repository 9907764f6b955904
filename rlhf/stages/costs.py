"""What training by a reward costs: how far the SFT model's own answers have become unlikely, and what is forgotten.

All of it is measured without sampling from the policy, on texts that do not depend on it, so that the numbers of all
evaluations of a run, and of all runs from one SFT model, compare the same things.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.distributed import collectives
from rlhf.divergence import exact_kl
from rlhf.models.heads import most_likely
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, send
from rlhf.stages.cutting import Encoded
from rlhf.stages.passes import compute_divergence, logprobs_of


def forward_kl(
    logits: Float[Tensor, "batch time vocabulary"], ref_logits: Float[Tensor, "batch time vocabulary"]
) -> Float[Tensor, "batch time"]:
    """KL(π_ref ‖ π_θ) of the next-token distributions, in nats."""
    return exact_kl(ref_logits, logits)


@torch.no_grad()
def kl_and_entropy(
    roles: Roles, batch: Sequences, budget: int, temperature: float
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """The policy's exact KL from the reference and its entropy at every response token, in one pass, on the host.

    The two are in different orders.
    """
    entropies: list[Tensor] = []

    def both(logits: Tensor, ref_logits: Tensor) -> Tensor:
        logprobs = logits.float().log_softmax(-1)
        entropies.append(-(logprobs.exp() * logprobs).sum(-1).flatten())
        return exact_kl(logits, ref_logits)

    exact = compute_divergence(roles, batch, budget, temperature, both)
    return exact[send(batch.response_mask, exact.device)].cpu(), torch.cat(entropies).cpu()


@dataclass
class Costs:
    """Measures a policy on texts that do not depend on it.

    Attributes:
        texts: name → encoded texts, of each of which the perplexity is measured.
        facts: prompts with the beginning of an answer, and the tokens that state a fact: a model knows it if each of
            them is its most likely next token.
        answers: gives this process's share of the reference's answers for the forward KL (None if it has none), sampled
            when they are first needed.
        known: which facts the reference knows, once they have been measured.
    """

    texts: Mapping[str, Sequence[Encoded]] = field(default_factory=dict)
    facts: Sequence[Encoded] = ()
    answers: Callable[[], Sequences | None] | None = None
    known: Bool[Tensor, "facts"] | None = None

    @torch.no_grad()
    def measure(self, roles: Roles, budget: int, temperature: float) -> dict[str, float]:
        """The metrics of the policy; every process measures its share of the texts."""
        metrics = {f"eval/{name}_perplexity": perplexity(roles, rows, budget) for name, rows in self.texts.items()}
        if self.facts:
            if self.known is None:
                self.known = known_facts(roles, "reference", self.facts, budget)
            known = known_facts(roles, "policy", self.facts, budget)
            metrics["eval/facts_known"] = float(known.float().mean())
            if bool(self.known.any()):
                metrics["eval/facts_lost"] = float((self.known & ~known).sum() / self.known.sum())
        if self.answers is not None:
            batch = self.answers()
            sums = torch.zeros(2, device=roles.device)
            if batch is not None:
                exact = compute_divergence(roles, batch, budget, temperature, forward_kl)
                mask = send(batch.response_mask, exact.device)
                sums = torch.stack([exact[mask].sum(), mask.sum()])
            total, count = collectives.all_reduce_sum(sums).tolist()
            metrics["eval/forward_kl"] = total / count
        return metrics


def perplexity(roles: Roles, rows: Sequence[Encoded], budget: int) -> float:
    """exp of the policy's mean negative log-likelihood per response token of some texts, at temperature 1."""
    totals = torch.zeros(2, dtype=torch.double)
    for part in _shares(roles, rows, budget):
        logprobs = logprobs_of(roles, "policy", part, 1.0)
        totals += torch.tensor([-float(logprobs.double().sum()), float(len(logprobs))], dtype=torch.double)
    loss, count = collectives.all_reduce_sum(totals.to(roles.device, torch.float32)).tolist()
    return math.exp(min(loss / max(count, 1.0), 700.0))


def known_facts(roles: Roles, role: str, facts: Sequence[Encoded], budget: int) -> Bool[Tensor, "facts"]:
    """Whether a role completes each fact, token by token, with what it holds most likely; on the host."""
    found = torch.zeros(len(facts), device=roles.device)
    numbered = list(enumerate(facts))[collectives.rank() :: collectives.size()]
    own = Sequences.from_lists([prompt for _, (prompt, _) in numbered], [text for _, (_, text) in numbered])
    for group in roles.groups(own.lengths.tolist(), budget, frozen=True):
        part = own.rows(group)
        states = roles.states(role, part, part.predicting)
        with roles.autocast():
            guesses = most_likely(states, roles.output(role))
        right = guesses == send(part.target_ids, guesses.device)
        for place, tokens in zip(group, right.split(part.response_lengths.tolist()), strict=True):
            found[numbered[place][0]] = tokens.all().float()
    return collectives.all_reduce_sum(found).cpu() > 0


def _shares(roles: Roles, rows: Sequence[Encoded], budget: int) -> list[Sequences]:
    """This process's texts in batches of at most `budget` tokens."""
    own = rows[collectives.rank() :: collectives.size()]
    if not own:
        return []
    batch = Sequences.from_lists([prompt for prompt, _ in own], [text for _, text in own])
    return [batch.rows(group) for group in roles.groups(batch.lengths.tolist(), budget, frozen=True)]
