"""Our own decoding loop."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf.models.logits import head_of
from rlhf.models.roles import Roles
from rlhf.models.unpadded import takes_visible
from rlhf.rollout.decoding import CompiledStep, FixedStep, GrowingStep, prefill
from rlhf.rollout.engine import Generated, as_list
from rlhf.rollout.kv_cache import BufferCache

# How often the native engine looks which rows are done: each look waits for the device.
CHECK_EVERY = 4


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
        self.stops, self.capture, self.fixed = as_list(eos_token_id), capture_logprobs, fixed

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
