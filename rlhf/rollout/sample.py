"""The rollout batch: prompts answered by a role."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import Response, encode
from rlhf.models.tokens import stop_ids
from rlhf.rollout.engine import Engine, Generated
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine
from rlhf.settings import GenerationSettings


@dataclass
class Rollouts:
    """Prompts answered by the policy.

    `logprobs` are those the tokens were sampled with, `values` those of the states they were sampled in; both [batch,
    response], 0 on padding, or None when the engine does not tell them. `responses` are of the class `Response`.
    """

    sequences: Sequences
    logprobs: Float[Tensor, "batch response"] | None
    ended: Bool[Tensor, "batch"]
    prompts: list[str]
    responses: list[str]
    values: Float[Tensor, "batch response"] | None = None

    @property
    def mask(self) -> Bool[Tensor, "batch response"]:
        """The response tokens."""
        return self.sequences.response_mask


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
    """Answer `prompts`: encoded once, sampled in batches of similar prompt length, in their own order again.

    Sampled ids are kept as they are: the texts are decoded for judges and scorers, and never encoded again.
    """
    temperature = settings.temperature if temperature is None else temperature
    limit = max_new_tokens or settings.max_new_tokens
    encoded = encode(tokenizer, prompts)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    responses: list[list[int]] = [[] for _ in encoded]
    parts: list[tuple[list[int], Generated]] = []
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        with roles.uncompiled_blocks():
            part = engine.generate(roles, role, [encoded[i] for i in rows], limit, temperature, generator)
        for i, ids, length in zip(rows, part.ids.tolist(), part.lengths.tolist(), strict=True):
            responses[i] = ids[:length]
        parts.append((rows, part))
    sequences = Sequences.from_lists(encoded, responses).to(roles.device)
    stops = stop_ids(tokenizer, roles.trunk(role))
    ended = [ids[-1] in stops for ids in responses]
    decoded = tokenizer.batch_decode(responses, skip_special_tokens=True)
    texts: list[str] = [Response(*told) for told in zip(decoded, responses, ended, strict=True)]
    logprobs = _laid_out([(rows, part.logprobs) for rows, part in parts], sequences)
    values = _laid_out([(rows, part.values) for rows, part in parts], sequences)
    flags = torch.tensor(ended, device=roles.device)
    return Rollouts(sequences, logprobs, flags, list(prompts), texts, values)


def _laid_out(
    parts: Sequence[tuple[list[int], Tensor | None]], sequences: Sequences
) -> Float[Tensor, "batch response"] | None:
    """Numbers per token of some rows each, by row; None if a part has none."""
    mask = sequences.response_mask
    result = torch.zeros(mask.shape, device=mask.device)
    for rows, numbers in parts:
        if numbers is None:
            return None
        known = numbers[:, : mask.shape[1]]
        result[torch.tensor(rows, device=mask.device), : known.shape[1]] = known
    return result.masked_fill(~mask, 0.0)


def make_engine(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, roles: Roles) -> Engine:
    """The configured engine.

    Log-probs are captured as sampled unless `generation.capture_logprobs=never`; see `serve_as_old` for their use.
    """
    if settings.engine == "vllm":
        from rlhf.rollout.vllm import VllmEngine

        return VllmEngine(settings, tokenizer, roles)
    stops = stop_ids(tokenizer, roles.trunk("reference"))
    if settings.engine == "transformers":
        return TransformersEngine(stops, tokenizer.pad_token_id)
    capture = settings.capture_logprobs != "never"
    fixed = settings.cuda_graphs == "auto" and roles.device.type == "cuda" and not roles.sharded
    return NativeEngine(stops, capture, fixed)


def in_float32(roles: Roles) -> bool:
    """Whether weights and matrix products are float32, so that log-probs do not depend on the shape of the batch."""
    return roles.compute_dtype == torch.float32 and next(roles.parameters()).dtype == torch.float32


def serve_as_old(settings: GenerationSettings, roles: Roles) -> bool:
    """Whether captured log-probs are PPO's old ones as they are.

    `generation.capture_logprobs=auto`: where that is exact, from our own engine in float32. Elsewhere the same row in
    another batch shape or kernel has other log-probs: they are scored again at the shapes of the update, and the
    captured ones are there to be compared with them.
    """
    exact = settings.engine == "native" and in_float32(roles)
    return exact if settings.capture_logprobs == "auto" else settings.capture_logprobs == "always"
