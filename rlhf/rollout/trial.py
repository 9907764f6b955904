"""A trial of a model before anything is trained: do sampling and scoring compute the model's own log-probs?

A few tokens are sampled, scored and, if wanted, packed. Their log-probs are compared with those of the model's own
forward pass over one unpadded text at a time. A model for which they differ is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.errors import ModelError, first_line
from rlhf.models.blocks import evaluating
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, pack
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine

PROMPT_LENGTHS = (5, 11)  # different, so that one of the prompts is padded
NEW_TOKENS = 12
LARGEST_WINDOW = 128  # tokens: sliding windows up to this size are exceeded in the trial
# Largest allowed gap in nats: in float32 of any token, else of the mean (bf16 and int8 scatter by a few hundredths).
TOLERANCE, TOLERANCE_IN_16_BITS = 1e-3, 0.25
LEAKING = 4  # without float32, only the first tokens of the second packed text are compared: leaks show there
NO_EOS = -1  # no model samples this id
SEED = 0


@torch.no_grad()
def try_out(roles: Roles, role: str, engine: str = "", packing: bool = False) -> None:
    """Check that a role's log-probs are its model's own when sampled (by `engine`), scored and (`packing`) packed.

    `engine` is "native" or "transformers"; any other engine is not tried. Takes a few short forward passes. Random
    states, training modes and requires_grad are left unchanged.

    Raises:
        ModelError: log-probs differ, or the model cannot be run this way at all.
    """
    compiled, roles.compiled = roles.compiled, None  # do not compile a decoding step for the trial alone
    try:
        with evaluating(roles), roles.uncompiled_blocks():
            _try_out(roles, role, engine, packing)
    finally:
        roles.compiled = compiled


def _try_out(roles: Roles, role: str, engine: str, packing: bool) -> None:
    # 1. Make random prompts and responses.
    name = type(roles.trunk(role)).__name__
    generator = torch.Generator().manual_seed(SEED)
    count, vocabulary = _new_tokens(roles, role), roles.trunk(role).get_input_embeddings().num_embeddings
    prompts = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    responses = torch.randint(vocabulary, (len(prompts), count), generator=generator).tolist()

    # 2. Sample.
    if engine == "transformers":
        # It returns no log-probs. Decoding greedily, it must choose the tokens the model itself finds likeliest.
        with _refusing(f"generation.engine=transformers cannot sample from {name}", "another model"):
            request = GenerationRequest(prompts, count, 0.0, generator)
            generated = TransformersEngine(NO_EOS, 0).generate(roles, role, request)
            chosen, best = _own_logprobs(roles, role, prompts, generated.ids.tolist())
            _check_gaps(roles, _gaps(chosen, best))
    if engine == "native":
        allowed = "generation.engine=transformers or another model"
        with _refusing(f"generation.engine=native cannot sample from {name}", allowed):
            request = GenerationRequest(prompts, count, 1.0, generator)
            generated = NativeEngine(NO_EOS).generate(roles, role, request)
            responses = generated.ids.tolist()
            sampled = torch.cat(list(generated.logprobs))  # type: ignore[arg-type]
            _check_gaps(roles, _gaps(sampled, _own_logprobs(roles, role, prompts, responses)[0]))

    # 3. Score the responses in a padded batch.
    with _refusing(f"{name} cannot be scored in batches", "another model"):
        scored = _scored_logprobs(roles, role, Sequences.from_lists(prompts, responses))
        _check_gaps(roles, _gaps(scored, _own_logprobs(roles, role, prompts, responses)[0]))

    # 4. Score them packed into one row.
    if packing:
        with _refusing(f"sft.packing=true does not keep texts apart in {name}", "sft.packing=false or another model"):
            _check_packing(roles, role, prompts, responses)


def _check_packing(
    roles: Roles, role: str, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> None:
    texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    texts.sort(key=len, reverse=True)  # the order in which they are packed
    # Compare from the second token on: the effect of a leak may fade after a few tokens.
    first, rest = [text[:1] for text in texts], [text[1:] for text in texts]
    packed = pack(Sequences.from_lists(first, rest), sum(map(len, texts)))
    gaps = _gaps(_scored_logprobs(roles, role, packed), _own_logprobs(roles, role, first, rest)[0])
    _check_gaps(roles, gaps if _exact(roles) else gaps[len(rest[0]) :][:LEAKING])


def _new_tokens(roles: Roles, role: str) -> int:
    """How many tokens to sample: enough to exceed a small sliding window, within the model's positions."""
    config = roles.trunk(role).config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    wanted = window + NEW_TOKENS if 0 < window <= LARGEST_WINDOW else NEW_TOKENS
    longest_prompt = max(PROMPT_LENGTHS)
    positions = getattr(config, "max_position_embeddings", None) or wanted + longest_prompt
    return max(1, min(wanted, positions - longest_prompt))


def _own_logprobs(
    roles: Roles, role: str, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """Log-probs by the model's own forward pass over one text at a time, all responses concatenated.

    First those of the response tokens, then those of the likeliest tokens at the same positions.
    """
    chosen, best = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=roles.device)
        with roles.using_adapter(role) as model, roles.autocast():
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logprobs = logits.log_softmax(-1)
        chosen.append(logprobs.gather(-1, ids[0, len(prompt) :, None])[:, 0])
        best.append(logprobs.amax(-1))
    return torch.cat(chosen), torch.cat(best)


def _scored_logprobs(roles: Roles, role: str, batch: Sequences) -> Float[Tensor, "tokens"]:
    """Log-probs of the targets as training computes them."""
    return roles.token_stats(role, roles.states(role, batch, batch.predicting), batch.target_ids).logprobs


def _gaps(found: Float[Tensor, "tokens"], own: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    return (found.to(own) - own).abs()


def _exact(roles: Roles) -> bool:
    return roles.in_float32 and not roles.quantized


def _check_gaps(roles: Roles, gaps: Float[Tensor, "tokens"]) -> None:
    gap = float(gaps.max() if _exact(roles) else gaps.mean())
    if not gap <= (TOLERANCE if _exact(roles) else TOLERANCE_IN_16_BITS):  # also refuses NaN
        raise ModelError(f"log-probs are {gap:.2g} nats from the model's own")


@contextmanager
def _refusing(failure: str, allowed: str) -> Iterator[None]:
    """Turn any exception into a ModelError that starts with `failure`: which one it is depends on the architecture."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{failure} ({reason}); allowed: {allowed}") from error
