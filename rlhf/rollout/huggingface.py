"""Sampling with transformers' own `generate` (generation.engine=transformers): slower, and without log-probs."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from rlhf.models.roles import Roles
from rlhf.rollout.engine import Generated, GenerationRequest, id_list


class TransformersEngine:
    """Calls transformers' `generate`. The native engine is tested against it. Does not return log-probs."""

    def __init__(self, eos_token_id: int | Sequence[int], pad_token_id: int):
        self.stops, self.pad = id_list(eos_token_id), pad_token_id

    @torch.no_grad()
    def generate(self, roles: Roles, role: str, request: GenerationRequest) -> Generated:
        """See `rlhf.rollout.engine.Engine`."""
        # 1. Pad the prompts on the left.
        width = max(len(prompt) for prompt in request.prompts)
        ids = torch.full((len(request.prompts), width), self.pad)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(request.prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1

        # 2. Sample. transformers draws from the global generator, which is seeded from ours and restored afterwards.
        config = self._config(request)
        devices = [roles.device] if roles.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), roles.using_adapter(role) as model, roles.autocast():
            generator = request.generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            # `generate` fills options that `config` leaves unset from the model's own configuration: replace that too.
            own, model.generation_config = model.generation_config, config
            try:
                output = model.generate(
                    ids.to(roles.device), attention_mask=mask.to(roles.device), generation_config=config
                )[:, width:]
            finally:
                model.generation_config = own

        # 3. A response ends at its first EOS.
        is_eos = torch.isin(output, torch.tensor(self.stops, device=output.device))
        lengths = torch.where(is_eos.any(1), is_eos.int().argmax(1) + 1, output.shape[1])
        return Generated(output, lengths, None)

    def _config(self, request: GenerationRequest) -> GenerationConfig:
        """Plain sampling at the request's temperature, or greedy decoding."""
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            max_new_tokens=request.max_new_tokens, eos_token_id=self.stops, pad_token_id=self.pad, **sampling
        )
