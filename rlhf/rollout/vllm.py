"""Sampling by vLLM (generation.engine=vllm): it serves the SFT model, and each call swaps the policy's adapter in.

Written against vLLM's public offline interface (`LLM`, `SamplingParams`, `LoRARequest`) and, for want of a GPU, NEVER
RUN: only what it refuses and the adapter that it hands over are tested.
"""

import gc
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.errors import explained
from rlhf.models.export import save_adapter
from rlhf.models.roles import Roles
from rlhf.models.tokens import stop_ids
from rlhf.rollout.engine import Generated
from rlhf.settings import GenerationSettings

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM can be made ready for
TEMPERATURES = (0.01, 2.0)  # vLLM raises what is lower, but not 0, to the first, and refuses what is higher
# what this engine decides, and what would make samples of another distribution than the plain softmax
NOT_YOURS = ("model", "dtype", "enable_lora", "max_loras", "max_lora_rank", "enable_prefix_caching", "logprobs_mode",
             "generation_config", "logits_processors")  # fmt: skip
_serving: dict[str, Any] = {}  # the one `vllm.LLM` of this process: two would not fit
_versions = itertools.count(1)  # vLLM knows an adapter by its number, which must never come back with other weights


class VllmEngine:
    """See `rlhf.rollout.engine.Engine`.

    Log-probs are asked for in vLLM's `processed_logprobs` mode, after the division by the temperature (its default,
    `raw_logprobs`, is before it). That is of the right distribution, as there is no top-k, top-p or penalty here, and
    still not what the update computes: vLLM multiplies in 16 bits, with other kernels and the adapter rounded. So they
    are told unless `generation.capture_logprobs=never`, and are the old ones for `always` alone (`serve_as_old`).

    Each row has a seed of its own from the generator. Their schedule is the same again in a process that continues a
    run: vLLM runs inside of it (`VLLM_ENABLE_V1_MULTIPROCESSING=0`) and keeps no prompts for later. On another GPU, or
    with another version of vLLM, there may be other ids.
    """

    def __init__(self, settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, roles: Roles):
        base = roles.trunk("reference")
        self.stops, self.capture = stop_ids(tokenizer, base), settings.capture_logprobs != "never"
        adapters = getattr(base, "peft_config", {})
        rank = adapters["policy"].r if "policy" in adapters else 1
        self.llm = _serve(
            model=base.name_or_path,  # a folder: that of the SFT model
            dtype=str(base.dtype).removeprefix("torch."),
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(size for size in RANKS if size >= rank),
            enable_prefix_caching=False,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # the model's own may ask for top-k and other filters
            **settings.vllm,
        )

    def generate(
        self,
        roles: Roles,
        role: str,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> Generated:
        """See `rlhf.rollout.engine.Engine`."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest

        seeds = torch.randint(2**62, (len(prompts),), generator=generator, device=generator.device).tolist()
        sampling = [
            SamplingParams(
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=max_new_tokens,
                seed=seed,
                ignore_eos=True,  # else vLLM's own reading of the model's files would decide; ours stay in the row
                stop_token_ids=list(self.stops),
                detokenize=False,
                logprobs=0 if self.capture else None,  # of the sampled token, and of no other
            )
            for seed in seeds
        ]
        with TemporaryDirectory() as folder:
            version, adapted = next(_versions), write_adapter(roles, role, Path(folder))
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
                sampling,
                use_tqdm=False,
                lora_request=LoRARequest(f"{role}-{version}", version, folder) if adapted else None,
            )
        completions = [output.outputs[0] for output in outputs]
        ids = torch.full((len(prompts), max_new_tokens), self.stops[0])
        logprobs = torch.zeros(len(prompts), max_new_tokens)
        for i, completion in enumerate(completions):
            tokens = list(completion.token_ids)
            ids[i, : len(tokens)] = torch.tensor(tokens)
            if self.capture:
                told = zip(tokens, completion.logprobs, strict=True)
                logprobs[i, : len(tokens)] = torch.tensor([step[token].logprob for token, step in told])
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        return Generated(ids, lengths, logprobs if self.capture else None)


def write_adapter(roles: Roles, role: str, folder: Path) -> bool:
    """Leave the role's adapter as plain peft loads it on the model that is served; False where the role has none.

    Raises:
        ValueError: the role runs on another model.
    """
    trunk, adapter = roles.table[role]
    if trunk != roles.table["reference"].trunk:
        raise ValueError(f"role {role} does not run on the model that vLLM serves")
    if adapter is None:
        return False
    base = roles.trunk(role)
    save_adapter(roles, role, base.peft_config[adapter], Path(base.name_or_path), None, folder)
    return True


def _serve(**options: Any) -> Any:
    """The `vllm.LLM` of these options: the one that is there, or else a new one in its place.

    Raises:
        ModelError: vLLM cannot serve this model, or not in the memory that it may take.
    """
    name = repr(sorted(options.items()))
    if name not in _serving:
        _serving.clear()
        gc.collect()
        torch.cuda.empty_cache()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when it is imported
        with explained("generation.engine=vllm: the model cannot be served"), torch.random.fork_rng():
            from vllm import LLM

            _serving[name] = LLM(**options)  # in this process it seeds the global generators
    return _serving[name]
