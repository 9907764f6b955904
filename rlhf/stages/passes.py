"""Forward passes over a rollout batch: frozen ones that measure it, and the update's own, with its dropout masks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.distributed import collectives
from rlhf.divergence import Divergence
from rlhf.models.heads import token_divergence
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, send, unflatten
from rlhf.seeding import mixed_seed
from rlhf.stages.minibatches import Minibatch


def by_rows(
    batch: Sequences, groups: Sequence[Sequence[int] | Tensor], passes: Callable[[int, Sequences], Tensor]
) -> Float[Tensor, "batch response"]:
    """Run a pass over groups of rows; each gives a number per response token, put back into the order of the batch."""
    mask = batch.response_mask
    values = torch.cat([passes(number, batch.rows(group)) for number, group in enumerate(groups)]).float()
    places = torch.cat([batch.response_places(group) for group in groups])
    return values.new_zeros(mask.numel()).index_copy(0, send(places, values.device), values).view(mask.shape)


# -- frozen passes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def compute_values(roles: Roles, batch: Sequences, budget: int) -> Float[Tensor, "batch response"]:
    """Value of the state in which each response token was chosen; at most `budget` tokens go through at once."""
    groups = roles.groups(batch.lengths.tolist(), budget, frozen=True)
    with roles.scoring("value"):
        return by_rows(
            batch, groups, lambda _, part: roles.heads["value"](roles.states("value", part, part.predicting))
        )


@torch.no_grad()
def compute_logprobs(
    roles: Roles, role: str, batch: Sequences, budget: int, temperature: float
) -> Float[Tensor, "batch response"]:
    """Log-probability of each response token under a role, in nats at the sampling temperature."""
    groups = roles.groups(batch.lengths.tolist(), budget, frozen=True)
    return by_rows(batch, groups, lambda _, part: logprobs_of(roles, role, part, temperature))


def logprobs_of(roles: Roles, role: str, part: Sequences, temperature: float) -> Float[Tensor, "tokens"]:
    """Log-probabilities of the response tokens of all rows, one after the other; differentiable."""
    hidden = roles.states(role, part, part.predicting)
    return roles.token_stats(role, hidden, part.target_ids, temperature).logprobs


@torch.no_grad()
def compute_reference_states(
    roles: Roles, batch: Sequences, budget: int, role: str = "reference"
) -> list[Float[Tensor, "response hidden"]]:
    """For each row the reference's hidden states that predict the response tokens."""
    states: list[Tensor] = [torch.empty(0)] * len(batch)
    for group in roles.groups(batch.lengths.tolist(), budget, frozen=True):
        part = batch.rows(group)
        hidden = roles.states(role, part, part.predicting)
        for row, own in zip(group, hidden.split(part.response_lengths.tolist()), strict=True):
            states[row] = own
    return states


@torch.no_grad()
def compute_reference_logprobs(
    roles: Roles, batch: Sequences, states: Sequence[Tensor], temperature: float, role: str = "reference"
) -> Float[Tensor, "batch response"]:
    """`compute_logprobs` of the reference from its hidden states (`compute_reference_states`)."""
    stats = roles.token_stats(role, torch.cat(list(states)), batch.target_ids, temperature)
    return unflatten(stats.logprobs, batch.response_mask)


@torch.no_grad()
def compute_divergence(
    roles: Roles,
    batch: Sequences,
    budget: int,
    temperature: float,
    divergence: Divergence,
    states: Sequence[Tensor] | None = None,
    role: str = "reference",
) -> Float[Tensor, "batch response"]:
    """A divergence between policy and reference (`role`) over the whole vocabulary, at every response token.

    `states` are the reference's (`compute_reference_states`), computed here if not given. Logits exist for one chunk of
    tokens at a time.
    """
    groups = roles.groups(batch.lengths.tolist(), budget, frozen=True)
    known = compute_reference_states(roles, batch, budget, role) if states is None else states

    def passes(number: int, part: Sequences) -> Tensor:
        reference = torch.cat([known[row] for row in groups[number]])
        return exact_divergence(
            roles, roles.states("policy", part, part.predicting), reference, temperature, divergence, role
        )

    return by_rows(batch, groups, passes)


def exact_divergence(
    roles: Roles,
    hidden: Float[Tensor, "tokens hidden"],
    ref_hidden: Float[Tensor, "tokens hidden"],
    temperature: float,
    divergence: Divergence,
    role: str = "reference",
) -> Float[Tensor, "tokens"]:
    """A divergence over the whole vocabulary from the hidden states of policy and reference; differentiable."""
    with roles.autocast():
        outputs = roles.output("policy"), roles.output(role)
        return token_divergence(divergence, hidden, ref_hidden, *outputs, temperature)


# -- the update's own passes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UpdatePasses:
    """Policy and value as the update computes them: at its micro-batches' shapes, under its dropout masks.

    A frozen pass at the same shapes and masks gives the same bits, so that the first ratio of an update is exactly 1.
    `dropout` says whether there are masks at all.
    """

    roles: Roles
    temperature: float
    seed: int
    dropout: bool

    @property
    def shared_trunk(self) -> bool:
        """Whether the value head reads the policy's own hidden states."""
        return self.roles.table.get("value") == self.roles.table["policy"]

    @property
    def has_value(self) -> bool:
        """Whether there is a value function."""
        return "value" in self.roles.table

    def states(self, role: str, part: Sequences, number: int, step: int) -> Float[Tensor, "tokens hidden"]:
        """The hidden states of policy or value under the dropout masks of micro-batch `number`; differentiable."""
        seed = mixed_seed(self.seed, own_stream(f"{role} dropout {number}"), step)
        with replayed_dropout(seed, self.dropout, self.roles.device):
            return self.roles.states(role, part, part.predicting)

    def old_logprobs(self, batch: Sequences, minibatches: Sequence[Minibatch]) -> Float[Tensor, "batch response"]:
        """Log-probs of the sampled tokens at the update's shapes, without dropout."""
        groups = [part.rows for minibatch in minibatches for part in minibatch]
        return by_rows(batch, groups, lambda _, part: logprobs_of(self.roles, "policy", part, self.temperature))

    def replay(
        self, batch: Sequences, minibatches: Sequence[Minibatch], step: int
    ) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"] | None]:
        """Log-probs of the sampled tokens, and values (if any), at the update's shapes and under its dropout masks."""
        groups = [part.rows for minibatch in minibatches for part in minibatch]
        values: list[Tensor] = []

        def passes(number: int, part: Sequences) -> Tensor:
            states = self.states("policy", part, number, step)
            if self.has_value:
                value_states = states if self.shared_trunk else self.states("value", part, number, step)
                values.append(self.roles.heads["value"](value_states))
            return self.roles.token_stats("policy", states, part.target_ids, self.temperature).logprobs

        self.roles.train()
        logprobs = by_rows(batch, groups, passes)
        self.roles.eval()
        return logprobs, by_rows(batch, groups, lambda number, _: values[number]) if self.has_value else None


def own_stream(purpose: str) -> str:
    """The name of a random stream that this process has for itself."""
    return f"{purpose} of process {collectives.rank()}" if collectives.rank() else purpose


@contextmanager
def replayed_dropout(seed: int, active: bool, device: torch.device) -> Iterator[None]:
    """Draw dropout masks from `seed` and leave the global random state as it was.

    The same micro-batch under the same seed sees the same masks, so that old and new log-probs are of one policy (the
    published code takes the old ones without dropout and the new ones with it).
    """
    if not active:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
