"""Our own decoding loop (generation.engine=native): with log-probs and values, and without work for finished rows."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.models.logits import head_of
from rlhf.models.roles import Roles
from rlhf.models.unpadded import takes_visible
from rlhf.rollout.attention import grouped_attention
from rlhf.rollout.batch import DecodingBatch
from rlhf.rollout.decoding import CompiledStep, GrowingStep, prefill
from rlhf.rollout.engine import Generated, GenerationRequest, id_list
from rlhf.rollout.fixed import FixedStep
from rlhf.rollout.kv_cache import BufferCache

CHECK_EVERY = 4  # steps between looks for finished rows
SHRINK_BELOW = 0.9  # drop finished rows once at most this share of the batch would remain: dropping copies the cache


class NativeEngine:
    """Decodes with any causal language model of transformers.

    The adapter is merged into copies of the adapted matrices. Keys and values are stored in one preallocated buffer per
    layer. Finished rows are dropped from the batch. Every row has its own random numbers, so its tokens do not depend
    on the other rows. With `fixed`, steps have fixed shapes and run as CUDA graphs on a GPU, if our own mask can say
    everything about the model's attention.
    """

    def __init__(self, eos_token_id: int | Sequence[int], capture_logprobs: bool = True, fixed: bool = False):
        self.stops, self.capture, self.fixed = id_list(eos_token_id), capture_logprobs, fixed

    @torch.no_grad()
    def generate(self, roles: Roles, role: str, request: GenerationRequest) -> Generated:
        """See `rlhf.rollout.engine.Engine`."""
        # 1. Choose the side of the padding. Where our own mask can say everything about attention, prompts are padded
        #    on the right. Elsewhere the model makes its masks itself, from distances in the cache: padding on the left
        #    keeps those equal to the distances in the text.
        longest = max(map(len, request.prompts)) + request.max_new_tokens
        pad_right = takes_visible(roles.trunk(role), longest)

        # 2. Values come for free if the value head reads the hidden states of the sampled role.
        shared = "value" in roles.heads and roles.table["value"] == roles.table[role]
        value_head = roles.heads["value"] if self.capture and shared else None

        # 3. Fill the cache with the prompts, then sample token by token.
        batch = DecodingBatch(request, self.stops, pad_right, roles.device)
        with roles.merged(role) as model, roles.autocast():
            forward, hidden = self._prefill(roles, model, batch)
            output = head_of(model)
            # Where our mask holds. A compiled step keeps the attention that it was compiled with.
            grouped = pad_right and not isinstance(forward, CompiledStep)
            with grouped_attention(model) if grouped else nullcontext():
                self._decode(output, value_head, forward, hidden, batch)
        logprobs = batch.logprobs if self.capture else None
        values = None if value_head is None else batch.values
        return Generated(batch.ids, batch.lengths, logprobs, values)

    def _prefill(
        self, roles: Roles, model: PreTrainedModel, batch: DecodingBatch
    ) -> tuple[GrowingStep, Float[Tensor, "batch hidden"]]:
        """Run the prompts through the model: the step to continue with, and each prompt's last hidden state."""
        capacity = batch.width + batch.limit
        cache = BufferCache(model.config.get_text_config().num_hidden_layers, capacity)
        place = torch.arange(capacity, device=roles.device)
        lengths = batch.prompt_lengths[:, None]
        held = place >= batch.width - lengths
        # All rows are active at this point. A prompt with several answers is read once.
        first, of_row = batch.distinct_prompts()
        read = prefill(model, batch.prompts[first], cache, None if batch.pad_right else held[first, : batch.width])
        hidden = read[of_row, batch.prompt_lengths - 1 if batch.pad_right else -1]
        if len(first) < len(of_row):
            cache.keep(of_row)
        if not batch.pad_right:
            return GrowingStep(model, cache, held), hidden
        visible = ((place < lengths) | (place >= batch.width))[:, None, None]
        if self.fixed:
            return FixedStep(model, cache, visible, capture=roles.device.type == "cuda"), hidden
        if roles.compiled:
            return CompiledStep(model, cache, visible, roles.compiled), hidden
        return GrowingStep(model, cache, visible), hidden

    def _decode(
        self,
        output: nn.Module,
        value_head: nn.Module | None,
        forward: GrowingStep,
        hidden: Float[Tensor, "batch hidden"],
        batch: DecodingBatch,
    ) -> None:
        """Sample tokens into `batch`, from the hidden states after the prompts on."""
        for step in range(batch.limit):
            # 1. Sample the next token of each active row.
            draws = batch.draws[batch.active, step]
            token, logprob = sample_tokens(output(hidden).float(), batch.temperature, draws, self.capture)
            batch.append(step, token, logprob, None if value_head is None else value_head(hidden))
            if step + 1 == batch.limit:
                break

            # 2. Drop finished rows, and stop when all are finished.
            place = batch.width + step
            if step and step % CHECK_EVERY == 0:
                unfinished = batch.unfinished()
                if unfinished == 0:
                    break
                size = forward.batch_size(unfinished, place)
                if size <= SHRINK_BELOW * len(batch.active):
                    rows = batch.first(size)
                    forward.keep(rows)
                    batch.keep(rows)
                    token = token[rows]

            # 3. Run the model on the sampled tokens.
            hidden = forward(token, batch.prompt_lengths[batch.active] + step, place)


def sample_tokens(
    logits: Float[Tensor, "rows vocabulary"], temperature: float, draws: Float[Tensor, "rows"], capture: bool
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """One token per row, and its log-probability (zeros unless `capture`).

    Inverts the cumulative distribution at `draws`, uniform in [0, 1). Temperature 0 takes the likeliest token.

    The last 1e-6 of the distribution, in the order of the vocabulary, is never sampled: rounding in the cumulative sum
    could otherwise choose a token of probability 0. Log-probs are those of the full distribution, from which the
    sampled one differs by at most 1e-6 in probability.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        scaled = logits
    else:
        scaled = logits / temperature
        cumulative = _cumulative(scaled.softmax(-1))
        # The last entry of the cumulative sum is not exactly 1.
        threshold = draws.clamp(max=1 - 1e-6)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    if not capture:
        return token, torch.zeros_like(draws)
    return token, scaled.gather(-1, token[:, None]).squeeze(1) - scaled.logsumexp(-1)


def _cumulative(probabilities: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
    """Cumulative sums, up to a factor; in integers where they must have the same bits every time.

    A GPU may add floats in another order each time, so torch refuses to in deterministic mode.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum(-1)
    return (probabilities.double() * 2**52).long().cumsum(-1).double()
