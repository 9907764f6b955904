"""Prompts, a scripted engine and calls of engines for tests of rollouts."""

from collections.abc import Sequence

import torch

from rlhf.models.roles import Roles
from rlhf.rollout.engine import Generated, GenerationRequest


class EchoEngine:
    """An engine that derives a response from its prompt alone, so that one process and two get the same rollouts.

    The second answer to a prompt in a request is another one, and so on.
    """

    def generate(self, roles: Roles, role: str, request: GenerationRequest) -> Generated:
        before = [request.prompts[:row].count(prompt) for row, prompt in enumerate(request.prompts)]
        rows = [
            [3 + (7 * word + place + 11 * number) % 40 for place, word in enumerate(prompt)] + [1]
            for number, prompt in zip(before, request.prompts, strict=True)
        ]
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.ones(len(rows), request.max_new_tokens, dtype=torch.long)
        for row, words in zip(ids, rows, strict=True):
            row[: len(words)] = torch.tensor(words)
        return Generated(ids, lengths, None)


EOS, PAD, LIMIT = 1, 0, 20

KINDS = ["llama", "tied", "neox"]

PROMPTS = [[5, 9, 7], [3], [11, 4, 4, 30, 8, 22, 17], [40, 41], [6, 6, 6, 6, 6], [49, 3, 12, 13]] * 4


def seeded_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(engine: object, roles: Roles, prompts: Sequence[Sequence[int]] = PROMPTS, **options: object) -> Generated:
    """Sample from the policy at temperature 1 with a fixed seed, unless options say otherwise."""
    defaults = {"role": "policy", "max_new_tokens": LIMIT, "temperature": 1.0, "generator": seeded_generator()}
    chosen = defaults | options
    role = chosen.pop("role")
    return engine.generate(roles, role, GenerationRequest(prompts, **chosen))  # type: ignore[arg-type, attr-defined]


def response_rows(generated: Generated) -> list[list[int]]:
    """The token ids of each response, without padding."""
    return [ids[:n] for ids, n in zip(generated.ids.tolist(), generated.lengths.tolist(), strict=True)]
