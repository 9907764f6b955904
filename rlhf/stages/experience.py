"""What PPO knows about a rollout batch before it updates, and the frozen passes that find it out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.models.heads import token_divergence
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, unflatten

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Experience:
    """A rollout batch ready for updates; all [batch, response], 0 on padding.

    `old_logprobs` and `old_values` are what the update's ratios and value clip start from, under the update's dropout
    masks. `sampled_logprobs` (None where nothing needs them) and `values` are without dropout, like the sampling:
    penalty and KL are of the former, advantages and returns of the latter. `sampling_gap` is how far captured
    log-probs are from scored ones, where both are known by now. `rewards` are shaped but not whitened. `ref_logprobs`
    is None when the reference pass was not made. An exact divergence keeps the reference's hidden states (by row,
    [response, hidden]) and the weight it has in the loss.
    """

    sequences: Sequences
    mask: Bool[Tensor, "batch response"]
    old_logprobs: Float[Tensor, "batch response"]
    old_values: Float[Tensor, "batch response"]
    values: Float[Tensor, "batch response"]
    rewards: Float[Tensor, "batch response"]
    penalty: Float[Tensor, "batch response"]
    advantages: Float[Tensor, "batch response"]
    returns: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"] | None
    ref_hidden: list[Tensor] | None = None
    divergence_weight: Tensor | float = 0.0
    sampled_logprobs: Float[Tensor, "batch response"] | None = None
    sampling_gap: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be looked at elsewhere."""
        # copies: without dropout some are one and the same, which safetensors would refuse
        own = {key: value.clone() for key, value in vars(self).items() if isinstance(value, Tensor)}
        return self.sequences.tensors() | own


def by_rows(
    batch: Sequences, groups: Sequence[Sequence[int]], passes: Callable[[int, Sequences], Tensor]
) -> Float[Tensor, "batch response"]:
    """Run a pass over groups of rows; each gives a number per response token, laid out by row again."""
    mask = batch.response_mask
    result = torch.zeros(mask.shape, device=mask.device)
    for number, group in enumerate(groups):
        rows = torch.tensor(group, device=mask.device)
        part = batch.rows(rows)
        values = unflatten(passes(number, part), part.response_mask)
        result[rows, : values.shape[1]] = values
    return result


@torch.no_grad()
def score_values(roles: Roles, batch: Sequences, budget: int) -> Float[Tensor, "batch response"]:
    """Value of the state in which each response token was chosen."""
    groups = roles.groups(batch.lengths.tolist(), budget)
    with roles.scoring("value"):
        return by_rows(
            batch, groups, lambda _, part: roles.heads["value"](roles.states("value", part, part.predicting))
        )


@torch.no_grad()
def score_logprobs(
    roles: Roles, role: str, batch: Sequences, budget: int, temperature: float
) -> Float[Tensor, "batch response"]:
    """Log-probability of each response token under a role, in nats at the sampling temperature."""
    groups = roles.groups(batch.lengths.tolist(), budget)
    return by_rows(batch, groups, lambda _, part: logprobs_of(roles, role, part, temperature))


def logprobs_of(roles: Roles, role: str, part: Sequences, temperature: float) -> Float[Tensor, "tokens"]:
    """Log-probabilities of a part's response tokens, one after the other."""
    hidden = roles.states(role, part, part.predicting)
    return roles.token_stats(role, hidden, part.target_ids, temperature).logprobs


@torch.no_grad()
def reference_states(roles: Roles, batch: Sequences, budget: int) -> list[Float[Tensor, "response hidden"]]:
    """For each row the reference's hidden states that predict the response tokens."""
    states: list[Tensor] = [torch.empty(0)] * len(batch)
    for group in roles.groups(batch.lengths.tolist(), budget):
        part = batch.rows(torch.tensor(group, device=batch.ids.device))
        hidden = roles.states("reference", part, part.predicting)
        for row, own in zip(group, hidden.split(part.response_mask.sum(1).tolist()), strict=True):
            states[row] = own
    return states


@torch.no_grad()
def score_states(
    roles: Roles, batch: Sequences, states: Sequence[Tensor], temperature: float
) -> Float[Tensor, "batch response"]:
    """`score_logprobs` of the reference from hidden states that are known already."""
    stats = roles.token_stats("reference", torch.cat(list(states)), batch.target_ids, temperature)
    return unflatten(stats.logprobs, batch.response_mask)


@torch.no_grad()
def score_exact(
    roles: Roles,
    batch: Sequences,
    budget: int,
    temperature: float,
    divergence: Divergence,
    states: Sequence[Tensor] | None = None,
) -> Float[Tensor, "batch response"]:
    """A divergence between policy and reference over the whole vocabulary, at every response token.

    `states` are the reference's (`reference_states`), made here if not given. Logits exist for a chunk of tokens.
    """
    groups = roles.groups(batch.lengths.tolist(), budget)
    known = reference_states(roles, batch, budget) if states is None else states

    def passes(number: int, part: Sequences) -> Tensor:
        reference = torch.cat([known[row] for row in groups[number]])
        return exact_divergence(
            roles, roles.states("policy", part, part.predicting), reference, temperature, divergence
        )

    return by_rows(batch, groups, passes)


def exact_divergence(
    roles: Roles,
    hidden: Float[Tensor, "tokens hidden"],
    ref_hidden: Float[Tensor, "tokens hidden"],
    temperature: float,
    divergence: Divergence,
) -> Float[Tensor, "tokens"]:
    """A divergence over the whole vocabulary from the hidden states of policy and reference; differentiable."""
    with roles.autocast():
        outputs = roles.output("policy"), roles.output("reference")
        return token_divergence(divergence, hidden, ref_hidden, *outputs, temperature)


@contextmanager
def replayed_dropout(seed: int, active: bool, device: torch.device) -> Iterator[None]:
    """Draw dropout masks from `seed` and leave the global random state as it was.

    The same micro-batch under the same seed sees the same masks, so that old and new log-probs are of one policy and
    the first ratio is exactly 1 (the published code takes old ones without dropout and new ones with it).
    """
    if not active:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
