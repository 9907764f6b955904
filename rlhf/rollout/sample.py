"""Rollouts: prompts answered by a role, as ids and as texts, with the log-probs and values captured while sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, send
from rlhf.models.tokenizing import Response, encode
from rlhf.models.tokens import stop_ids
from rlhf.rollout.engine import Engine, Generated, GenerationRequest
from rlhf.settings import GenerationSettings


@dataclass
class Rollouts:
    """Prompts and the sampled responses.

    `ended` marks responses that end with an EOS. `responses` are strings of the class `Response`, which also hold the
    ids. `logprobs` are those at the sampling temperature, in nats; `values` are those of the states in which the tokens
    were chosen. Both are 0 on padding, and None if the engine does not compute them. `token_rewards` are what a scorer
    says of each token, if it does (`rlhf.stages.scoring`).
    """

    sequences: Sequences
    logprobs: Float[Tensor, "batch response"] | None
    ended: Bool[Tensor, "batch"]
    prompts: list[str]
    responses: list[str]
    values: Float[Tensor, "batch response"] | None = None
    token_rewards: Float[Tensor, "batch response"] | None = None

    @property
    def mask(self) -> Bool[Tensor, "batch response"]:
        """Marks the response tokens, on the device."""
        return send(self.sequences.response_mask, self.ended.device)


def rollout(
    engine: Engine,
    roles: Roles,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: GenerationSettings,
    generator: torch.Generator,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> Rollouts:
    """Sample one response per prompt, in batches of `settings.batch_size` prompts of similar length.

    Results are in the order of the prompts. `temperature` and `max_new_tokens` default to those of `settings`.
    """
    temperature = settings.temperature if temperature is None else temperature
    limit = max_new_tokens or settings.max_new_tokens

    # 1. Encode the prompts and batch them by length, so that there is little padding.
    encoded = encode(tokenizer, prompts)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]

    # 2. Sample. Blocks run uncompiled: each shape of a batch of prompts occurs about once.
    parts: list[Generated] = []
    for rows in batches:
        request = GenerationRequest([encoded[row] for row in rows], limit, temperature, generator)
        with roles.uncompiled_blocks():
            parts.append(engine.generate(roles, role, request))

    # 3. Put everything back into the order of the prompts.
    responses: list[list[int]] = [[] for _ in encoded]
    for rows, part in zip(batches, parts, strict=True):
        for row, ids, length in zip(rows, part.ids.tolist(), part.lengths.tolist(), strict=True):
            responses[row] = ids[:length]
    sequences = Sequences.from_lists(encoded, responses)
    mask = send(sequences.response_mask, roles.device)
    logprobs = _in_prompt_order(batches, [part.logprobs for part in parts], mask)
    values = _in_prompt_order(batches, [part.values for part in parts], mask)

    # 4. Decode for judges and scorers. The ids stay what was sampled: encoding a text again could give other ids.
    stops = stop_ids(tokenizer, roles.trunk(role))
    ended = [ids[-1] in stops for ids in responses]
    decoded = tokenizer.batch_decode(responses, skip_special_tokens=True)
    texts: list[str] = [Response(*response) for response in zip(decoded, responses, ended, strict=True)]
    return Rollouts(sequences, logprobs, send(torch.tensor(ended), roles.device), list(prompts), texts, values)


def _in_prompt_order(
    batches: Sequence[Sequence[int]], parts: Sequence[Tensor | None], mask: Bool[Tensor, "batch response"]
) -> Float[Tensor, "batch response"] | None:
    """Join per-token numbers of batches; `batches` holds the rows of each. None if any part is None."""
    result = torch.zeros(mask.shape, device=mask.device)
    for rows, numbers in zip(batches, parts, strict=True):
        if numbers is None:
            return None
        # An engine's tensors may be longer than the longest response.
        numbers = numbers[:, : mask.shape[1]]
        result[send(torch.tensor(rows), mask.device), : numbers.shape[1]] = numbers
    return result.masked_fill(~mask, 0.0)
