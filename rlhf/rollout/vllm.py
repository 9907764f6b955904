"""Sampling with vLLM (generation.engine=vllm): it serves the SFT model and loads the policy's adapter for each call.

Written against the source of vLLM 0.27.1 (`LLM`, its sleep mode and shutdown, `SamplingParams`, `LoRARequest`) and
NEVER RUN. Tests cover the checks of the configuration, the adapter that is passed on, and
(with a stand-in for vLLM) when it sleeps and is shut down.
"""

import gc
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.errors import explained
from rlhf.models.export import save_adapter
from rlhf.models.roles import Roles
from rlhf.models.tokens import stop_ids
from rlhf.rollout.engine import Generated, GenerationRequest
from rlhf.settings import GenerationSettings

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # allowed values of vLLM's `max_lora_rank`
TEMPERATURES = (0.01, 2.0)  # vLLM raises lower temperatures, except 0, to the first and refuses higher than the second
# Keywords of `vllm.LLM` that users cannot set: this engine sets them, or they would change the sampling distribution.
NOT_YOURS = ("model", "dtype", "enable_lora", "max_loras", "max_lora_rank", "enable_prefix_caching", "logprobs_mode",
             "generation_config", "logits_processors", "enable_sleep_mode")  # fmt: skip
_serving: dict[str, Any] = {}  # the only `vllm.LLM` of this process, by its options: two would not fit into memory
_versions = itertools.count(1)  # vLLM identifies an adapter by a number: each set of weights needs its own


class VllmEngine:
    """Samples with vLLM on the GPU of this process, where vLLM has its share of the memory only while it samples.

    Log-probs are requested in vLLM's `processed_logprobs` mode, that is, after the division by the temperature (the
    default, `raw_logprobs`, is before it). Without top-k, top-p and penalties they are those of the sampled
    distribution, but not exactly those of the update: vLLM multiplies in 16 bits, with other kernels and a rounded
    adapter. They are returned unless `generation.capture_logprobs=never`, and PPO takes them as its old log-probs only
    for `always` (`use_captured_logprobs`).

    Each prompt has its own seed, drawn from the generator. A process that resumes a run schedules the prompts as the
    first one did, because vLLM runs inside the process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`) and caches no prompts. With
    another GPU or another version of vLLM the ids may differ.
    """

    def __init__(self, settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase, roles: Roles):
        base = roles.trunk("reference")
        self.stops, self.capture = stop_ids(tokenizer, base), settings.capture_logprobs != "never"
        adapters = getattr(base, "peft_config", {})
        rank = adapters["policy"].r if "policy" in adapters else 1
        self.llm = _serve(
            model=base.name_or_path,  # the folder of the SFT model
            dtype=str(base.dtype).removeprefix("torch."),
            enable_lora=True,
            max_loras=1,
            max_lora_rank=next(size for size in RANKS if size >= rank),
            enable_prefix_caching=False,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # ignore the model's own, which may ask for top-k and other filters
            **settings.vllm,
        )

    def generate(self, roles: Roles, role: str, request: GenerationRequest) -> Generated:
        """See `rlhf.rollout.engine.Engine`."""
        from vllm import TokensPrompt
        from vllm.lora.request import LoRARequest

        # 1. Sample with the role's current adapter, which vLLM reads from a folder.
        sampling = self._sampling_params(request)
        with TemporaryDirectory() as folder, _awake(self.llm):
            version, has_adapter = next(_versions), write_adapter(roles, role, Path(folder))
            outputs = self.llm.generate(
                [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in request.prompts],
                sampling,
                use_tqdm=False,
                lora_request=LoRARequest(f"{role}-{version}", version, folder) if has_adapter else None,
            )

        # 2. Pad the responses and their log-probs.
        completions = [output.outputs[0] for output in outputs]
        ids = torch.full((len(completions), request.max_new_tokens), self.stops[0])
        logprobs = torch.zeros(len(completions), request.max_new_tokens)
        for i, completion in enumerate(completions):
            tokens = list(completion.token_ids)
            ids[i, : len(tokens)] = torch.tensor(tokens)
            if self.capture:
                steps = zip(tokens, completion.logprobs, strict=True)
                logprobs[i, : len(tokens)] = torch.tensor([step[token].logprob for token, step in steps])
        lengths = torch.tensor([len(completion.token_ids) for completion in completions])
        return Generated(ids, lengths, logprobs if self.capture else None)

    def _sampling_params(self, request: GenerationRequest) -> list[Any]:
        """Plain sampling at the request's temperature, with a seed for each prompt."""
        from vllm import SamplingParams

        generator = request.generator
        seeds = torch.randint(2**62, (len(request.prompts),), generator=generator, device=generator.device).tolist()
        return [
            SamplingParams(
                temperature=request.temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=request.max_new_tokens,
                seed=seed,
                # Stop at our ids only, not at those vLLM reads from the model's files. Stop ids stay in the response.
                ignore_eos=True,
                stop_token_ids=list(self.stops),
                detokenize=False,
                logprobs=0 if self.capture else None,  # 0: of the sampled token only
            )
            for seed in seeds
        ]


def write_adapter(roles: Roles, role: str, folder: Path) -> bool:
    """Save the role's adapter in peft's format, for the model that vLLM serves. False if the role has no adapter.

    Raises:
        ValueError: the role does not run on the served model.
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
    """The `vllm.LLM` with these options, asleep; a running one with other options is shut down.

    Raises:
        ModelError: vLLM cannot serve this model, or needs more memory than it may use.
    """
    name = repr(sorted(options.items()))
    if name not in _serving:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM reads it on import
        # In this process, vLLM seeds the global generators: restore them.
        with explained("generation.engine=vllm: the model cannot be served"), torch.random.fork_rng():
            while _serving:
                _shut_down(_serving.popitem()[1])
            gc.collect()
            torch.cuda.empty_cache()
            from vllm import LLM

            llm = LLM(**options, enable_sleep_mode=True)
            # vLLM exempts all that exists from garbage collection: this run's models would outlive it.
            gc.unfreeze()
            llm.sleep(level=1)
            _serving[name] = llm
    return _serving[name]


@contextmanager
def _awake(llm: Any) -> Iterator[None]:
    """Give vLLM its share of the GPU's memory, and on exit take it back for the update.

    Asleep at level 1, it keeps the weights in host memory and no cache. Level 2 would discard the weights, which never
    change here (adapters do), and read them from the disk before each rollout.

    Raises:
        ModelError: the memory is taken.
    """
    with explained("generation.engine=vllm: vLLM cannot have its share of the GPU (gpu_memory_utilization) back"):
        torch.cuda.empty_cache()  # what an update has freed is PyTorch's until then
        llm.wake_up()
    try:
        yield
    finally:
        llm.sleep(level=1)


def _shut_down(llm: Any) -> None:
    """Free what vLLM holds on the GPU, which dropping the object does not.

    vLLM must be awake: asleep its memory is unmapped, and would be unmapped a second time when it is freed.
    """
    torch.cuda.empty_cache()
    llm.wake_up()
    llm.llm_engine.engine_core.shutdown()
