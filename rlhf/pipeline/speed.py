"""How fast this machine runs a model: passes of its architecture at a few blocks, timed and extrapolated to all blocks.

The weights are made up, so nothing is downloaded; the code is that of training and sampling. What is quantised in the
run is not quantised here, and CUDA graphs, optimiser steps, logging and saving are left out.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cached_property

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.models.activations import FLOAT32
from rlhf.models.assembly import lora_config
from rlhf.models.loading import DTYPES, switch_off_dropout
from rlhf.models.memory import available
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.models.sizes import Sizes
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.native import NativeEngine
from rlhf.settings import LoraSettings, Settings

SMALL = 20_000_000  # weights up to which the whole model is timed
ON_CPU = 512  # tokens of a timed pass on a CPU, at most
PRODUCTS = 2**37  # and its products: a second or two
NO_EOS = -1  # no model samples this id
FEW, MORE = 3, 9  # sampled tokens, by whose difference a decoding step is timed


class Speed:
    """Times passes of a model; every method returns seconds. `device` is where."""

    def __init__(self, settings: Settings, sizes: Sizes, device: str):
        self.settings, self.sizes, self.device = settings, sizes, device
        self._known: dict[tuple[int, str], Roles] = {}

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The numbers of blocks that are timed."""
        return (self.sizes.layers,) if self.sizes.parameters <= SMALL or self.sizes.layers < 3 else (1, 2)

    @property
    def fits(self) -> bool:
        """Whether the memory that is free has room for the model that is timed, and as much again for its passes."""
        sizes = self.sizes
        weights = sizes.parameters - sizes.linear * (1 - max(self.depths) / sizes.layers)
        return 2 * FLOAT32 * weights < available(self.device != "cpu")

    def per_token(self, lora: LoraSettings, budget: int, length: int, learn: bool, words: bool = True) -> float:
        """A pass over texts of `length` tokens, per token; with `learn` also its gradients.

        `words`: including the log-probs of all tokens.
        """
        rows = max(self._affordable(budget) // length, 1)
        texts = torch.randint(
            self.sizes.vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)
        ).tolist()
        batch = Sequences.from_lists([text[:1] for text in texts], [text[1:] for text in texts])

        def run(roles: Roles) -> None:
            with torch.set_grad_enabled(learn):
                states = roles.states("policy", batch, batch.predicting)
                loss = roles.token_stats("policy", states, batch.target_ids).logprobs.sum() if words else states.sum()
                if learn:
                    loss.backward()

        return self._extrapolated(lora, run) / (rows * length)

    def answering(self, lora: LoraSettings, rows: int, prompt: int, new: float) -> float:
        """Answering `rows` prompts at a time with `new` tokens each."""

        def sample(count: int) -> float:
            prompts = [[row % self.sizes.vocabulary, *[1] * (prompt - 1)] for row in range(rows)]  # read once each
            request = GenerationRequest(prompts, count, 1.0, torch.Generator(self.device).manual_seed(0))
            engine = NativeEngine(NO_EOS, self.settings.generation.capture_logprobs != "never")
            return self._extrapolated(lora, lambda roles: engine.generate(roles, "policy", request))

        few, more = sample(FEW), sample(MORE)
        return few + max(more - few, 0) / (MORE - FEW) * max(new - FEW, 0)

    def _affordable(self, budget: int) -> int:
        """At most `budget` tokens: on a CPU, as many as a second or two allows."""
        if self.device != "cpu":
            return budget
        weights = self.sizes.linear // self.sizes.layers * max(self.depths)
        return max(min(budget, ON_CPU, PRODUCTS // (6 * max(weights, 1))), 1)

    def _extrapolated(self, lora: LoraSettings, run: Callable[[Roles], object]) -> float:
        """Seconds of `run` with all blocks."""
        times = [self._fastest(self._roles(depth, lora), run) for depth in self.depths]
        return times[0] if len(times) == 1 else times[0] + (self.sizes.layers - 1) * max(times[1] - times[0], 0)

    def _fastest(self, roles: Roles, run: Callable[[Roles], object]) -> float:
        """The shorter of two runs, after one that compiles, allocates and looks up."""
        run(roles)
        times = []
        for _ in range(2):
            started = time.perf_counter()
            run(roles)
            if self.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    def _roles(self, depth: int, lora: LoraSettings) -> Roles:
        key = (depth, repr(lora))
        if key not in self._known:
            self._known[key] = self._made(depth, lora)
        return self._known[key]

    def _made(self, depth: int, lora: LoraSettings) -> Roles:
        """A policy with so many blocks, an adapter on each of them, and made-up weights."""
        full, dtype = lora.r == 0, DTYPES[self.settings.model.dtype]
        model = _shallow(self.sizes.model, depth, torch.float32 if full else dtype, self.device)
        roles = Roles(model, dtype)
        if not full:
            with torch.random.fork_rng():
                roles.add_adapter("base", "policy", lora_config(replace(lora, layers_to_transform=None), model))
        roles.table["policy"] = Role("base", None if full else "policy")
        roles.train_only("policy")
        if self.settings.model.gradient_checkpointing:
            roles.checkpoint_activations()
        return roles.train()


def _shallow(model: PreTrainedModel, depth: int, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model like this skeleton with fewer blocks; all weights are the same number."""
    config = deepcopy(model.config)
    text = config.get_text_config()
    blocks, text.num_hidden_layers = text.num_hidden_layers, depth
    for key, value in vars(text).items():  # some architectures list what each block is
        if isinstance(value, list) and len(value) == blocks:
            setattr(text, key, value[:depth])
    with torch.device("meta"):
        shallow = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shallow.to_empty(device=device)
    shallow.tie_weights()
    for tensor in (*shallow.parameters(), *shallow.buffers()):
        tensor.data.fill_(0.01)
    switch_off_dropout(shallow)
    return shallow.eval()
