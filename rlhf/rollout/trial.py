"""A model tried out before anything is trained: is what is sampled and scored here what the model itself would say?

A few tokens are sampled, scored and, where that is wanted, packed, and their log-probs are compared with those of the
model's own forward pass over each text alone. What turns out to be another distribution is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.errors import ModelError, first_line
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences, pack
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine

PROMPTS = (5, 11)  # their lengths: padding has to be told from text
NEW_TOKENS = 12
LARGEST_WINDOW = 128  # tokens of a sliding window that is looked beyond
# Nats that log-probs may be apart: in float32 each of them, else their mean (bf16 and int8 scatter by some hundredths).
CLOSE, CLOSE_IN_16_BITS = 1e-3, 0.25
LEAKING = 4  # tokens of a text after another one that are looked at where all scatter
NEVER = -1  # an EOS that no model samples
SEED = 0


@torch.no_grad()
def try_out(roles: Roles, role: str, engine: str = "", packing: bool = False) -> None:
    """See that the log-probs of a role are its model's own: as they are scored, sampled (`engine`) and packed.

    `engine` is native, transformers, or another one, which is not tried. Takes a few short passes. Random states, modes
    and what trains are as they were before.

    Raises:
        ModelError: they are those of another distribution, or the model cannot be run so at all.
    """
    name = type(roles.trunk(role)).__name__
    compiled, roles.compiled = roles.compiled, None  # a compiled step would be compiled for the trial alone
    try:
        with _evaluating(roles), roles.uncompiled_blocks():
            _try_out(roles, role, name, engine, packing)
    finally:
        roles.compiled = compiled


def _try_out(roles: Roles, role: str, name: str, engine: str, packing: bool) -> None:
    draws = torch.Generator().manual_seed(SEED)
    count, vocabulary = _new_tokens(roles, role), roles.trunk(role).get_input_embeddings().num_embeddings
    prompts = [torch.randint(vocabulary, (length,), generator=draws).tolist() for length in PROMPTS]
    responses = torch.randint(vocabulary, (len(prompts), count), generator=draws).tolist()
    if engine == "transformers":
        with _refusing(f"generation.engine=transformers cannot sample from {name}", "another model"):
            said = TransformersEngine(NEVER, 0).generate(roles, role, prompts, count, 0.0, draws)
            chosen, best = _alone(roles, role, prompts, said.ids.tolist())
            _compare(roles, chosen, best)  # as it takes the likeliest tokens, if it sees what the model sees
    if engine == "native":
        other = "generation.engine=transformers or another model"
        with _refusing(f"generation.engine=native cannot sample from {name}", other):
            said = NativeEngine(NEVER).generate(roles, role, prompts, count, 1.0, draws)
            responses = said.ids.tolist()
            sampled = torch.cat(list(said.logprobs))  # type: ignore[arg-type]
            _compare(roles, sampled, _alone(roles, role, prompts, responses)[0])
    with _refusing(f"{name} cannot be scored in batches", "another model"):
        own = _alone(roles, role, prompts, responses)[0]
        batch = Sequences.from_lists(prompts, responses).to(roles.device)
        _compare(roles, _scored(roles, role, batch), own)
    if packing:
        with _refusing(f"sft.packing=true does not keep texts apart in {name}", "sft.packing=false or another model"):
            texts = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
            texts.sort(key=len, reverse=True)  # as they are packed
            # from the second token on: what leaks may be gone after a few
            starts, rest = [text[:1] for text in texts], [text[1:] for text in texts]
            packed = pack(Sequences.from_lists(starts, rest), sum(map(len, texts)))
            apart = _gaps(_scored(roles, role, packed.to(roles.device)), _alone(roles, role, starts, rest)[0])
            _bound(roles, apart if _exact(roles) else apart[len(rest[0]) :][:LEAKING])


def _new_tokens(roles: Roles, role: str) -> int:
    """So many that a small sliding window is left behind, but no more than the model has positions for."""
    config = roles.trunk(role).config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    wanted = window + NEW_TOKENS if 0 < window <= LARGEST_WINDOW else NEW_TOKENS
    room = getattr(config, "max_position_embeddings", None) or wanted + max(PROMPTS)
    return max(1, min(wanted, room - max(PROMPTS)))


def _alone(
    roles: Roles, role: str, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "tokens"], Float[Tensor, "tokens"]]:
    """By the model's own forward pass over one text after the other, log-probs of the response tokens.

    Second, those of the likeliest tokens in their places.
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


def _scored(roles: Roles, role: str, batch: Sequences) -> Float[Tensor, "tokens"]:
    return roles.token_stats(role, roles.states(role, batch, batch.predicting), batch.target_ids).logprobs


def _compare(roles: Roles, found: Float[Tensor, "tokens"], own: Float[Tensor, "tokens"]) -> None:
    _bound(roles, _gaps(found, own))


def _gaps(found: Float[Tensor, "tokens"], own: Float[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
    return (found.to(own) - own).abs()


def _exact(roles: Roles) -> bool:
    return roles.compute_dtype == torch.float32 and all(p.dtype == torch.float32 for p in roles.parameters())


def _bound(roles: Roles, gaps: Float[Tensor, "tokens"]) -> None:
    exact = _exact(roles)
    apart = float(gaps.max() if exact else gaps.mean())
    if not apart <= (CLOSE if exact else CLOSE_IN_16_BITS):
        raise ModelError(f"log-probs are {apart:.2g} nats from the model's own")


@contextmanager
def _refusing(failure: str, allowed: str) -> Iterator[None]:
    """Whatever goes wrong within is a failure of this kind: which error it is depends on the architecture."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{failure} ({reason}); allowed: {allowed}") from error


@contextmanager
def _evaluating(roles: Roles) -> Iterator[None]:
    """Without dropout, and afterwards each module in the mode that it was in."""
    training = [module for module in roles.modules() if module.training]
    roles.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
