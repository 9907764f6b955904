"""The settings that the stages read: one schema (`rlhf.schema`) per config group, such as `PPOSettings` for `conf/ppo`.

Groups that name a class by `_target_` (data, scorer, judge, preferences, kl, reference, trainer, logger) have no schema
here: the signature of that class declares their keys. `quantization` holds keywords of transformers'
BitsAndBytesConfig. What a key means is explained beside it in `conf/`, whose values replace the defaults here; those
serve objects made in code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import omegaconf

from rlhf.policy_settings import (
    METHODS,
    AdvantagesSettings,
    BestOfNSettings,
    DivergenceSettings,
    DPOSettings,
    ExpertIterationSettings,
    LossTermSettings,
    OptimizerSettings,
    PolicySettings,
)
from rlhf.schema import (
    ALL_LINEAR,
    at_least_zero,
    checked,
    choice,
    fraction,
    number_or_auto,
    optional_positive,
    positive,
    seed,
)

JOINED = "joined"  # of `sft.packing`: as published (`rlhf.stages.joining`)


def is_target_modules(x: Any) -> bool:
    """Whether this says which layers an adapter is put on."""
    return x == ALL_LINEAR or (isinstance(x, list) and all(isinstance(name, str) for name in x))


@dataclass
class ModelSettings:
    """`conf/model`: where the language model comes from, and the dtype of its frozen base.

    `rlhf.pipeline.config.settings_of` replaces `dtype=auto` by a dtype.
    """

    name: str = omegaconf.MISSING
    name_or_path: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = choice("float32", "bfloat16", "float16", "auto")
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    max_prompt_tokens: int = positive()


@dataclass
class LoraSettings:
    """`conf/lora`: the adapter; `r: 0` (lora=none) trains the whole model."""

    r: int = at_least_zero()
    alpha: float = positive(64)
    dropout: float = fraction(0.0)
    target_modules: Any = checked(is_target_modules, f"a list of names of linear layers, or {ALL_LINEAR}", [])
    layers_to_transform: list[int] | None = None
    rslora: bool = False
    dora: bool = False
    lr_ratio: float = positive(1.0)
    init: str = "default"
    modules_to_save: list[str] | None = None

    @property
    def scale(self) -> float:
        """The factor of the product B A: alpha / r, or with rsLoRA alpha / √r (arXiv 2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


@dataclass
class SupervisedSettings(OptimizerSettings):
    """What the two supervised stages share: how much data they see, and in batches of how many rows.

    With `from_`, the key `from`, nothing is trained: the model is a checkpoint that exists already.
    """

    seed: int = seed()
    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = positive()
    max_steps: int | None = optional_positive()
    batch_size: int = positive()
    max_length: int = positive()
    from_: str | None = None
    difference_to: str | None = None


@dataclass
class SFTSettings(SupervisedSettings):
    """`conf/sft`: supervised fine-tuning."""

    group = "sft"
    loss_on: str = choice("response", "assistant", "text")
    packing: Any = checked(lambda x: x is True or x is False or x == JOINED, "false, true or joined", False)
    validation_size: int = positive(200)


@dataclass
class RewardSettings(SupervisedSettings):
    """`conf/reward`: the reward model; `model` is what it is trained on if that is not the SFT model."""

    group = "reward"
    model: ModelSettings | None = None
    template: str = "auto"
    validation_size: int = positive(500)
    baseline_rows: int = positive(256)
    group_prompts: bool = False
    average_of: int = positive(1)
    margin_coef: float = at_least_zero(0.0)
    length_coef: Any = number_or_auto(0.0, whole=False)
    lm_coef: float = at_least_zero(0.0)
    token_coef: float = at_least_zero(0.0)
    center_coef: float = at_least_zero(0.0)


@dataclass
class PPOSettings(PolicySettings):
    """`conf/ppo`: proximal policy optimisation. A step is a rollout batch.

    `rlhf.pipeline.preflight.settle_budget` replaces `microbatch_tokens=auto` by a number before anything reads it.
    """

    group = "ppo"
    microbatch_tokens: Any = number_or_auto(4096)
    rollout_batch_size: int = positive()
    minibatch_size: int = positive()
    epochs: int = positive()
    gamma: float = fraction(1.0)
    lam: float = fraction(0.95)
    clip_range: float = positive(0.2)
    clip_range_high: float | None = optional_positive()
    dual_clip: float | None = checked(lambda x: x is None or x > 1, "a number above 1, or null", None)
    ratio: str = choice("token", "sequence")
    loss_aggregation: str = choice("token_mean", "sequence_mean", "constant")
    value_clip_range: float | None = optional_positive(0.2)
    value_coef: float = at_least_zero(0.1)
    whiten_rewards: bool = True
    whiten_advantages: bool = True
    missing_eos_penalty: float = at_least_zero(0.0)
    score_normalization: str = choice("none", "scale", "standardize")
    score_clip: float | None = optional_positive()
    score_transform: str = choice("none", "par")
    reference_answers: int = positive(1)
    accumulation: str = choice("exact", "as_published")
    published_rows: int = positive(16)
    entropy_coef: float = at_least_zero(0.0)
    ptx_coef: float = at_least_zero(0.0)
    ptx_batch_size: int | None = optional_positive()
    ptx_texts: str | None = None
    value_model: str = choice("adapter", "trunk_head", "full", "none")
    value_bias: bool = False
    target_kl: float | None = optional_positive()
    schedule_steps: int | None = optional_positive()
    reference_every: int = positive(10)


@dataclass
class GenerationSettings:
    """`conf/generation`: how rollouts are sampled. Top-k and top-p are absent because they would bias every KL.

    `rlhf.pipeline.preflight.settle_budget` replaces `batch_size=auto` by a number before anything reads it.
    """

    engine: str = choice("native", "transformers", "vllm")
    max_new_tokens: int = positive()
    temperature: float = positive(1.0)
    samples_per_prompt: int = positive(1)
    batch_size: Any = number_or_auto(64)
    capture_logprobs: str = choice("auto", "always", "never")
    cuda_graphs: str = choice("auto", "never")
    vllm: dict[str, Any] = checked(
        lambda x: type(share := x.get("gpu_memory_utilization")) in (int, float) and 0 < share < 1,
        "keywords of vllm.LLM, gpu_memory_utilization being a number between 0 and 1",
        {"gpu_memory_utilization": 0.4},
    )


@dataclass
class EvaluationSettings:
    """`conf/evaluation`: what evaluations measure; `factscore` and `gold` name a class, which checks its own keys."""

    temperature: float = at_least_zero(0.0)
    max_new_tokens: int = positive()
    prompts: int = positive()
    kl_prompts: int = positive()
    best_of: int = positive(1)
    demonstrations: int = at_least_zero(0)
    texts: str | None = None
    diversity_samples: int = at_least_zero(0)
    steps: str = choice("all", "last")
    samples: int = at_least_zero(20)
    factscore: dict[str, Any] | None = None
    gold: dict[str, Any] | None = None
    difficulty: str | None = None


@dataclass
class GuardSettings:
    """A guard of `conf/guards`: what happens when it finds something, and how many logged values it looks at."""

    action: str = choice("off", "warn", "stop")
    window: int = positive()

    def __post_init__(self) -> None:
        if self.action == "False":  # YAML reads a bare off as false
            self.action = "off"


@dataclass
class LimitGuard(GuardSettings):
    """A guard with a threshold."""

    limit: float = at_least_zero()


@dataclass
class GapGuard(LimitGuard):
    """A guard with another threshold where weights or matrix products are not float32."""

    limit_low_precision: float = at_least_zero()


@dataclass
class GuardsSettings:
    """`conf/guards`: what each guard finds is said there. An object made without arguments has all of them off."""

    non_finite: GuardSettings = field(default_factory=GuardSettings)
    first_ratio: LimitGuard = field(default_factory=LimitGuard)
    sampling_gap: GapGuard = field(default_factory=GapGuard)
    negative_kl: LimitGuard = field(default_factory=LimitGuard)
    large_kl: LimitGuard = field(default_factory=LimitGuard)
    repetition: LimitGuard = field(default_factory=LimitGuard)
    length_cap: LimitGuard = field(default_factory=LimitGuard)
    mute: LimitGuard = field(default_factory=LimitGuard)
    overoptimization: LimitGuard = field(default_factory=LimitGuard)
    linear_range: LimitGuard = field(default_factory=LimitGuard)
    entropy_collapse: LimitGuard = field(default_factory=LimitGuard)
    entropy_rise: LimitGuard = field(default_factory=LimitGuard)
    explained_variance: LimitGuard = field(default_factory=LimitGuard)
    spike: LimitGuard = field(default_factory=LimitGuard)

    def at_precision(self, float32: bool) -> "GuardsSettings":
        """Choose the limit of `sampling_gap` for the precision of the model."""
        gap = self.sampling_gap
        return self if float32 else replace(self, sampling_gap=replace(gap, limit=gap.limit_low_precision))


@dataclass
class Settings:
    """The whole configuration of the stages, resolved and checked."""

    seed: int = seed()
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    sft: SFTSettings = field(default_factory=SFTSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    best_of_n: BestOfNSettings = field(default_factory=BestOfNSettings)
    expert_iteration: ExpertIterationSettings = field(default_factory=ExpertIterationSettings)
    divergence: DivergenceSettings = field(default_factory=DivergenceSettings)
    loss_terms: dict[str, LossTermSettings] = field(default_factory=dict)
    advantages: AdvantagesSettings = field(default_factory=AdvantagesSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    guards: GuardsSettings = field(default_factory=GuardsSettings)
    quantization: dict[str, Any] | None = None

    def method(self, stage: str) -> PolicySettings:
        """The settings of the method by which a stage trains a policy; those of PPO if it trains none."""
        found: PolicySettings = getattr(self, stage if stage in METHODS else "ppo")
        return found


def is_quantized(quantization: Mapping[str, Any] | None) -> bool:
    """Whether the frozen base is stored in int8 or nf4."""
    return any(value for key, value in (quantization or {}).items() if key.startswith("load_in_"))
