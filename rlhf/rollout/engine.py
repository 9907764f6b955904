"""The rollout batch and the engines that sample it.

Sampling is plain: softmax of the logits over the temperature, no top-k, top-p or minimum length, whatever the
generation_config of a checkpoint asks for, because log-probs of another distribution than the sampled one would bias
every divergence. A response ends at any of the ids that the model stops at (`stop_ids`), each of them an EOS here. An
EOS counts as a response token when it was sampled, and is never appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf.models.logits import head_of
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import Response, encode
from rlhf.models.tokens import stop_ids
from rlhf.models.unpadded import takes_visible
from rlhf.rollout.decoding import CompiledStep, FixedStep, GrowingStep, prefill
from rlhf.rollout.kv_cache import BufferCache
from rlhf.settings import GenerationSettings

# How often the native engine looks which rows are done: each look waits for the device.
CHECK_EVERY = 4


@dataclass
class Generated:
    """Sampled ids [batch, time] after the prompts, each row valid up to its length (EOS included).

    `logprobs` of the ids, and `values` of the states they were chosen in where the value head is on the same trunk.
    """

    ids: Int[Tensor, "batch time"]
    lengths: Int[Tensor, "batch"]
    logprobs: Float[Tensor, "batch time"] | None
    values: Float[Tensor, "batch time"] | None = None


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


@runtime_checkable
class Engine(Protocol):
    """Samples continuations of `prompts` (lists of ids) from a role's distribution.

    `temperature` 0 is greedy. Rows end at EOS (kept) or at `max_new_tokens`. The same generator state gives the same
    ids. `logprobs` are under the sampling temperature (float32, nats).
    """

    def generate(
        self,
        roles: Roles,
        role: str,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Generated:
        """Sampled continuations, in the order of the prompts."""
        ...


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
        with roles.plain_blocks():
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


def _listed(ids: int | Sequence[int]) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids)


class NativeEngine:
    """Our own decoding loop, on any causal model of transformers.

    Padding is masked out of the cache, the adapter is merged into copies of the adapted matrices, keys and values lie
    in one buffer, and rows that are done are dropped from the batch. Prompts are padded on the right where a mask of
    ours says all (`takes_visible`), and else on the left, so that places in the cache are as far apart as the tokens,
    and the model makes its own masks. Each row
    draws its own numbers, so what it says does not depend on which other rows are still there. `fixed` decodes at fixed
    shapes, on a GPU as CUDA graphs.
    """

    def __init__(self, eos_token_id: int | Sequence[int], capture_logprobs: bool = True, fixed: bool = False):
        self.stops, self.capture, self.fixed = _listed(eos_token_id), capture_logprobs, fixed

    @torch.no_grad()
    def generate(
        self,
        roles: Roles,
        role: str,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Generated:
        """See `Engine`."""
        device = roles.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width, batch = int(lengths.max()), len(prompts)
        ours = takes_visible(roles.trunk(role), width + max_new_tokens)
        padded = torch.zeros(batch, width, dtype=torch.long)
        for row, prompt in zip(padded, prompts, strict=True):
            row[slice(len(prompt)) if ours else slice(width - len(prompt), width)] = torch.tensor(prompt)
        padded, lengths = padded.to(device), lengths.to(device)
        draws = torch.rand(batch, max_new_tokens, generator=generator, device=generator.device).to(device)

        out = torch.full((batch, max_new_tokens), self.stops[0], device=device)
        stops = torch.tensor(self.stops, device=device)
        logprobs = torch.zeros(batch, max_new_tokens, device=device)
        shared = "value" in roles.heads and roles.table["value"] == roles.table[role]
        head = roles.heads["value"] if self.capture and shared else None
        values = torch.zeros(batch, max_new_tokens, device=device)
        ends = torch.full((batch,), max_new_tokens, device=device)
        alive = torch.arange(batch, device=device)
        done = torch.zeros(batch, dtype=torch.bool, device=device)
        with roles.merged(role) as model, roles.autocast():
            capacity = width + max_new_tokens
            cache = BufferCache(model.config.get_text_config().num_hidden_layers, capacity)
            place = torch.arange(capacity, device=device)
            if ours:
                held = (place < lengths[:, None]) | (place >= width)
                last = prefill(model, padded, cache)[torch.arange(batch, device=device), lengths - 1]
                held = held[:, None, None]
            else:
                held = place >= width - lengths[:, None]
                last = prefill(model, padded, cache, held[:, :width])[:, -1]
            forward = GrowingStep(model, cache, held)
            if self.fixed and ours:
                forward = FixedStep(model, cache, held, capture=device.type == "cuda")
            elif roles.compiled and ours:
                forward = CompiledStep(model, cache, held, roles.compiled)
            output = head_of(model)
            for step in range(max_new_tokens):
                logits = output(last).float()
                token, logprob = _choose(logits, temperature, draws[alive, step], self.capture)
                out[alive, step] = token
                logprobs[alive, step] = logprob
                if head is not None:
                    values[alive, step] = head(last)
                newly = (token[:, None] == stops).any(1) & ~done
                ends[alive] = torch.where(newly, step + 1, ends[alive])
                done |= newly
                if step + 1 == max_new_tokens:
                    break
                if step % CHECK_EVERY == CHECK_EVERY - 1:
                    rows = forward.remaining(done)
                    if len(rows) == 0:
                        break
                    if len(rows) <= 0.9 * len(alive):
                        forward.keep(rows)
                        alive, token, done = alive[rows], token[rows], done[rows]
                last = forward(token, lengths[alive] + step, width + step)
        return Generated(out, ends, logprobs if self.capture else None, None if head is None else values)


def _choose(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, draws: Float[Tensor, "rows"], capture: bool
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """A token per row by inverting the cumulative distribution at `draws` in [0, 1), and its log-probability.

    Tokens in the last 1e-6 of the distribution, in the order of the vocabulary, are never sampled: rounding in the
    cumulative sum could otherwise choose one of probability 0. The log-probs are of the whole distribution, from which
    that differs by at most 1e-6 in probability.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        scaled = logits
    else:
        scaled = logits / temperature
        cumulative = scaled.softmax(-1).cumsum(-1)
        threshold = draws.clamp(max=1 - 1e-6)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    if not capture:
        return token, torch.zeros_like(draws)
    return token, scaled.gather(-1, token[:, None]).squeeze(1) - scaled.logsumexp(-1)


class TransformersEngine:
    """Hugging Face `generate`: the reference that the native engine is tested against. Tells no log-probs."""

    def __init__(self, eos_token_id: int | Sequence[int], pad_token_id: int):
        self.stops, self.pad = _listed(eos_token_id), pad_token_id

    @torch.no_grad()
    def generate(
        self,
        roles: Roles,
        role: str,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Generated:
        """See `Engine`."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad)
        seen = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            seen[i, width - len(prompt) :] = 1
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        plain = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self.stops, pad_token_id=self.pad,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )  # fmt: skip
        devices = [roles.device] if roles.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), roles.acting(role) as model, roles.autocast():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            # `generate` takes what its argument leaves open from the model's own configuration
            own, model.generation_config = model.generation_config, plain
            try:
                output = model.generate(
                    ids.to(roles.device), attention_mask=seen.to(roles.device), generation_config=plain
                )[:, width:]
            finally:
                model.generation_config = own
        ended = torch.isin(output, torch.tensor(self.stops, device=output.device))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, output.shape[1])
        return Generated(output, lengths, None)


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
