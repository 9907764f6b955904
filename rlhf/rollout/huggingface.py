"""Hugging Face `generate` as an engine."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from rlhf.models.roles import Roles
from rlhf.rollout.engine import Generated, as_list


class TransformersEngine:
    """Hugging Face `generate`: the reference that the native engine is tested against. Tells no log-probs."""

    def __init__(self, eos_token_id: int | Sequence[int], pad_token_id: int):
        self.stops, self.pad = as_list(eos_token_id), pad_token_id

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
        with torch.random.fork_rng(devices=devices), roles.using_adapter(role) as model, roles.autocast():
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
