"""Estimate the memory of every stage of a run from its configuration, without creating weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from rlhf.models.activations import FLOAT32, Passes
from rlhf.models.sequences import frozen_tokens
from rlhf.models.sizes import Sizes
from rlhf.settings import LoraSettings, Settings

PROGRAM = 700 * 2**20  # bytes of the process itself on a CPU: torch, transformers, lightning (measured)
CONTEXT = 512 * 2**20  # bytes that CUDA and its libraries take of a GPU's memory (assumed)
GAPS = 1.05  # on a GPU: what PyTorch's allocator reserves for what is made and freed, relative to its size (assumed)
TRAINED = 4 + 4 + 8  # bytes per trained parameter, in float32: itself, its gradient, AdamW's two moments


@dataclass(frozen=True)
class Memory:
    """Memory of a stage in bytes. `phases` alternate; the rest is held throughout."""

    stage: str
    program: int
    weights: int
    trained: int
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The most memory held at once, in bytes."""
        return self.peak_of(*self.phases)

    def peak_of(self, *phases: str) -> int:
        """The most memory held at once in these phases, in bytes; those that the stage does not have count 0."""
        largest = max((self.phases.get(name, 0) for name in phases), default=0)
        return self.program + self.weights + self.trained + largest

    def __str__(self) -> str:
        parts = {"weights": self.weights, "training state": self.trained, **self.phases}
        listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
        return f"about {self.peak / 2**30:.1f} GiB for {self.stage} ({listed})"


@dataclass(frozen=True)
class Work:
    """What a run will do, as far as its memory depends on it.

    `stages` are those whose memory counts, of sft, preferences, reward, the methods and evaluate, and of taken and
    merged for a checkpoint that takes the place of training. `reward_model` says whether scorer or judge is one, as a
    role; `beside` are the bytes of one that is no role. Simulated preferences are of `answer_tokens`. The base is
    sharded over `shares` processes. `on_gpu` says where the run trains. `moving` is the role that a moving reference
    has its weights in, if any (`rlhf.stages.reference`). `members` further reward models score beside that one.
    """

    stages: tuple[str, ...] = ("ppo",)
    reward_model: bool = True
    beside: int = 0
    answer_tokens: int = 0
    shares: int = 1
    on_gpu: bool = False
    moving: str | None = None
    members: int = 0


def estimate(settings: Settings, sizes: Sizes, work: Work) -> Memory:
    """The most demanding of the stages of a run, in one process."""
    estimates = [stage_memory(stage, settings, sizes, work) for stage in work.stages]
    return max(estimates, key=lambda memory: memory.peak)


def stage_memory(stage: str, settings: Settings, sizes: Sizes, work: Work) -> Memory:
    """The memory of one stage in one process."""
    return _Stage(settings, sizes, work).memory(stage)


@dataclass(frozen=True)
class _Stage:
    settings: Settings
    sizes: Sizes
    work: Work

    @property
    def passes(self) -> Passes:
        return Passes(self.settings, self.sizes, self.work.on_gpu)

    def memory(self, stage: str) -> Memory:
        stages: dict[str, Callable[[], tuple[int, int, dict[str, int]]]] = {
            "sft": self.sft, "preferences": self.preferences, "reward": self.reward, "ppo": self.ppo,
            "dpo": self.dpo, "best_of_n": partial(self.best_of, "best_of_n"),
            "expert_iteration": partial(self.best_of, "expert_iteration"), "evaluate": self.evaluate,
            "taken": self.taken, "merged": self.merging,
        }  # fmt: skip
        weights, trained, phases = stages[stage]()
        program, gaps = (CONTEXT, GAPS) if self.work.on_gpu else (PROGRAM, 1.0)
        phases = {name: int(gaps * size) for name, size in phases.items()}
        if self.settings.generation.engine == "vllm":  # it sleeps in all other phases
            phases |= {name: _vllm_share(self.settings) for name in ("generating", "evaluating") if name in phases}
        return Memory(stage, program, weights, trained, phases)

    # -- the stages: (frozen weights, training state, phases) ----------------------------------------------------------

    def sft(self) -> tuple[int, int, dict[str, int]]:
        sft, sizes = self.settings.sft, self.sizes
        tokens = max(sft.microbatch_tokens, sft.max_length)
        phases = {"updating": self.passes.kept(tokens, sft.lora) + self.passes.logits(tokens)}
        # On the CPU the merged model is made in float32 beside all that; after training on a GPU, in host memory.
        if not self.work.on_gpu:
            phases["saving"] = FLOAT32 * sizes.parameters
        return self.base if sft.lora.r else 0, self.trained(sft.lora), phases

    def reward(self) -> tuple[int, int, dict[str, int]]:
        reward = self.settings.reward
        tokens = max(reward.microbatch_tokens, 2 * reward.max_length)  # both texts of a pair
        frozen = self.passes.frozen(frozen_tokens(tokens, self.work.on_gpu))
        logits = self.passes.logits(tokens) if reward.lm_coef else 0
        phases = {"updating": self.passes.kept(tokens, reward.lora) + logits, "baseline": frozen}
        return self.base if reward.lora.r else 0, self.trained(reward.lora), phases

    def preferences(self) -> tuple[int, int, dict[str, int]]:
        rows, prompt = self.settings.generation.batch_size, self.settings.model.max_prompt_tokens
        return self.base, 0, {"generating": self.passes.decoding(rows, prompt, self.work.answer_tokens)}

    def ppo(self) -> tuple[int, int, dict[str, int]]:
        settings = self.settings
        phases = {
            "generating": self.answering(settings.ppo.rollout_batch_size, settings.generation.max_new_tokens),
            **self.measuring(),
            "updating": self.updating(),
        }
        return self.roles, self.trained(settings.lora) + self.value_trained, phases

    def dpo(self) -> tuple[int, int, dict[str, int]]:
        """Both texts of a pair at a time; the reference reads them without gradients before the policy does."""
        dpo, lora = self.settings.dpo, self.settings.lora
        tokens = max(dpo.microbatch_tokens, 2 * dpo.max_length)
        updating = self.passes.kept(tokens, lora) + self.passes.logits(tokens)
        return self.roles, self.trained(lora), {**self.measuring(dpo.microbatch_tokens), "updating": updating}

    def best_of(self, stage: str) -> tuple[int, int, dict[str, int]]:
        """n answers to each prompt of a round, and passes over the best of them."""
        own, settings = getattr(self.settings, stage), self.settings
        tokens = max(own.microbatch_tokens, longest_text(settings))
        phases = {
            "generating": self.answering(own.prompts_per_round * own.n, settings.generation.max_new_tokens),
            **self.measuring(own.microbatch_tokens),
            "updating": self.passes.kept(tokens, settings.lora) + self.passes.logits(tokens),
        }
        return self.roles, self.trained(settings.lora), phases

    def evaluate(self) -> tuple[int, int, dict[str, int]]:
        parameters = (self.trained(self.settings.lora) + self.value_trained) * FLOAT32 // TRAINED
        return self.roles, parameters, self.measuring()

    def taken(self) -> tuple[int, int, dict[str, int]]:
        """A model that is taken from elsewhere; if it is a reward model, it scores demonstrations."""
        tokens = frozen_tokens(self.settings.reward.microbatch_tokens, self.work.on_gpu)
        return self.sizes.parameters * self.passes.size, 0, {"scoring": self.passes.frozen(tokens)}

    def merging(self) -> tuple[int, int, dict[str, int]]:
        """The same of an adapter, which is merged in float32: on a GPU's machine, in host memory."""
        weights, trained, phases = self.taken()
        merging = 0 if self.work.on_gpu else FLOAT32 * self.sizes.parameters - weights
        return weights, trained, {**phases, "merging": merging}

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> int:
        """The frozen base, with linear layers quantised or sharded."""
        linear = self.sizes.linear * self.passes.bytes_per_linear_weight / self.work.shares
        return int((self.sizes.parameters - self.sizes.linear) * self.passes.size + linear)

    @property
    def roles(self) -> int:
        """Base and reward model: an adapter in float32, or a model of its own."""
        lora = self.reward_lora
        own = FLOAT32 * self.sizes.adapter(lora) if lora.r else self.sizes.parameters * self.passes.size
        return self.base + own * (self.work.reward_model + self.work.members) + self.work.beside + self.moving

    @property
    def moving(self) -> int:
        """A moving reference: an adapter like the policy's and what it began as, or a whole model; in float32."""
        if self.work.moving is None:
            return 0
        lora = self.settings.lora
        return FLOAT32 * (2 * self.sizes.adapter(lora) if lora.r else self.sizes.parameters)

    @property
    def reward_lora(self) -> LoraSettings:
        """The adapter of the reward model, whose members it has the ranks of if it is an average."""
        reward = self.settings.reward
        return replace(reward.lora, r=reward.lora.r * reward.average_of)

    def trained(self, lora: LoraSettings) -> int:
        """An adapter, or for r = 0 the whole model, in float32, its gradients and AdamW's moments."""
        return TRAINED * (self.sizes.adapter(lora) if lora.r else self.sizes.parameters)

    @property
    def value_lora(self) -> LoraSettings | None:
        """What the value function trains beside its head (r = 0: a whole model); None if it trains nothing else."""
        settings, kind = self.settings, self.settings.ppo.value_model
        if kind in ("trunk_head", "none"):
            return None
        if settings.lora.r == 0 or kind == "full":
            return LoraSettings(r=0)
        lora, reward = settings.lora, self.reward_lora
        if not self.work.reward_model or reward.r == 0:
            return lora
        return replace(reward, r=max(lora.r, reward.r), dropout=lora.dropout)  # as `ppo_roles` makes it

    @property
    def value_trained(self) -> int:
        return self.trained(self.value_lora) if self.value_lora else 0

    @property
    def merged(self) -> int:
        """Copies of matrices with the policy's adapter merged in; none where it stays separate (`Roles.merged`)."""
        if self.settings.lora.r == 0:
            return self.passes.cast(self.settings.lora)
        if self.passes.quantized or self.work.shares > 1:
            return 0
        return sum(inputs * outputs for inputs, outputs in self.sizes.adapted(self.settings.lora)) * self.passes.size

    def answering(self, prompts: int, new: int) -> int:
        """Answering so many prompts in batches, by the policy."""
        rows = min(self.settings.generation.batch_size, prompts)
        return self.merged + self.passes.decoding(rows, self.settings.model.max_prompt_tokens, new)

    def measuring(self, budget: int | None = None) -> dict[str, int]:
        """Passes without gradients, and the answers of an evaluation: `best_of` to a prompt, in the same batches.

        The passes are those of PPO, or of another method whose passes have `budget` tokens.
        """
        evaluation, models = self.settings.evaluation, 2  # the true KL takes the logits of policy and reference
        largest = self.tokens if budget is None else max(budget, longest_text(self.settings))
        tokens = frozen_tokens(largest, self.work.on_gpu)
        scoring = self.passes.frozen(tokens) + self.passes.logits(tokens, models) + self.states
        merged = self.merged if self.passes.size == FLOAT32 else 0  # `Roles.scoring`
        answers = max(evaluation.prompts * evaluation.best_of, evaluation.kl_prompts * evaluation.diversity_samples)
        answering = self.answering(answers, evaluation.max_new_tokens)
        return {"scoring": scoring + merged, "evaluating": answering}

    def updating(self) -> int:
        """A pass with gradients, of the policy or of the value function: one is back-propagated before the next."""
        settings, ppo = self.settings, self.settings.ppo
        # a differentiable entropy keeps as much of the logits again, as the reference's do
        models = 1 + (settings.divergence.input == "logits") + bool(ppo.entropy_coef or settings.loss_terms)
        policy = self.passes.kept(self.tokens, settings.lora) + self.passes.logits(self.tokens, models)
        value = self.passes.kept(self.tokens, self.value_lora) if self.value_lora else 0
        mixed = max(ppo.microbatch_tokens, settings.sft.max_length) if ppo.ptx_coef else 0
        texts = self.passes.kept(mixed, settings.lora) + self.passes.logits(mixed) if mixed else 0
        return max(policy, value, texts) + self.states

    @property
    def states(self) -> int:
        """The reference's hidden states of a rollout batch, which an exact divergence holds."""
        rows, new = self.settings.ppo.rollout_batch_size, self.settings.generation.max_new_tokens
        exact = self.settings.divergence.input == "logits"
        return rows * new * self.sizes.hidden * self.passes.size if exact else 0

    @property
    def tokens(self) -> int:
        """Tokens of the largest pass of PPO."""
        return max(self.settings.ppo.microbatch_tokens, longest_text(self.settings))


def longest_text(settings: Settings) -> int:
    """Tokens of the longest prompt and the longest response of a rollout together."""
    return settings.model.max_prompt_tokens + settings.generation.max_new_tokens


def available(on_gpu: bool) -> int:
    """Free memory in bytes: of the GPU, or of the machine (`MemAvailable`)."""
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def _vllm_share(settings: Settings) -> int:
    """The part of the GPU's memory that vLLM takes while it samples, in bytes."""
    total = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    return int(total * settings.generation.vllm["gpu_memory_utilization"])
