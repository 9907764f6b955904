"""The typed half of the configuration: what the stages read.

Each class is the schema of the config group of its name; a wrong key or type fails when the configuration is composed,
and `positive`, `fraction` and `choice` say which values are allowed. Groups that name a class of their own by
`_target_` (data, scorer, judge, trainer, logger) are checked by that class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import omegaconf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.errors import ConfigError
from rlhf.errors.keys import unknown_key

T = TypeVar("T")


def positive(default: Any = omegaconf.MISSING) -> Any:
    """A number above 0."""
    return field(default=default, metadata={"check": lambda x: x > 0, "allowed": "a number above 0"})


def at_least_zero(default: Any = omegaconf.MISSING) -> Any:
    """A number of 0 or above."""
    return field(default=default, metadata={"check": lambda x: x >= 0, "allowed": "a number of 0 or above"})


def optional_positive(default: Any = None) -> Any:
    """A number above 0, or null."""
    return field(
        default=default, metadata={"check": lambda x: x is None or x > 0, "allowed": "a number above 0, or null"}
    )


def fraction(default: Any = omegaconf.MISSING) -> Any:
    """A number from 0 to 1."""
    return field(default=default, metadata={"check": lambda x: 0 <= x <= 1, "allowed": "a number from 0 to 1"})


def seed() -> Any:
    """What numpy and torch both take as a seed; 0 by default."""
    allowed = "a whole number from 0 to 4294967295"
    return field(default=0, metadata={"check": lambda x: 0 <= x < 2**32, "allowed": allowed})


def choice(*options: str) -> Any:
    """One of a few words; the first is the default."""
    allowed = " or ".join([", ".join(options[:-1]), options[-1]])
    return field(default=options[0], metadata={"check": lambda x: x in options, "allowed": allowed})


def _number(x: Any) -> float:
    return float(x) if type(x) in (int, float) else math.nan


@dataclass
class ModelSettings:
    """`conf/model`: where the language model comes from and in which dtype its frozen base is held."""

    name: str = omegaconf.MISSING
    name_or_path: str | None = None
    gguf_file: str | None = None
    tokenizer: str | None = None
    config: dict[str, Any] | None = None
    dtype: str = choice("float32", "bfloat16", "float16")
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    max_prompt_tokens: int = positive()


@dataclass
class LoraSettings:
    """`conf/lora`: `r: 0` (lora=none) tunes the whole model."""

    r: int = at_least_zero()
    alpha: float = positive(64)
    dropout: float = fraction(0.0)
    target_modules: list[str] = field(default_factory=list)


@dataclass
class OptimizerSettings:
    """What all three stages share: AdamW, its schedule, and how much goes through the model at once."""

    lr: float = positive()
    warmup_steps: int = at_least_zero(0)
    schedule: str = choice("linear", "cosine", "constant")
    weight_decay: float = at_least_zero(0.0)
    adam_eps: float = positive(1e-8)
    max_grad_norm: float | None = optional_positive(1.0)
    microbatch_tokens: int = positive(4096)
    log_every: int = positive(10)
    checkpoint_every: int = positive(50)


@dataclass
class SFTSettings(OptimizerSettings):
    """`conf/sft`: supervised fine-tuning."""

    seed: int = seed()
    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = positive()
    max_steps: int | None = optional_positive()
    batch_size: int = positive()
    max_length: int = positive()
    loss_on: str = choice("response", "text")
    packing: bool = False
    validation_size: int = positive(200)


@dataclass
class RewardSettings(OptimizerSettings):
    """`conf/reward`: the reward model."""

    seed: int = seed()
    lora: LoraSettings = field(default_factory=LoraSettings)
    epochs: float = positive()
    max_steps: int | None = optional_positive()
    batch_size: int = positive()
    max_length: int = positive()
    validation_size: int = positive(500)
    baseline_rows: int = positive(256)


@dataclass
class PPOSettings(OptimizerSettings):
    """`conf/ppo`: proximal policy optimisation; steps are rollout batches.

    `rlhf.pipeline.preflight.settle_budget` replaces `microbatch_tokens=auto` by a number before anything reads it.
    """

    microbatch_tokens: Any = field(
        default=4096,
        metadata={
            "check": lambda x: x == "auto" or (type(x) is int and x > 0),
            "allowed": "a whole number above 0, or auto",
        },
    )
    lr_full: float = positive()
    steps: int = positive()
    rollout_batch_size: int = positive()
    minibatch_size: int = positive()
    epochs: int = positive()
    gamma: float = fraction(1.0)
    lam: float = fraction(0.95)
    clip_range: float = positive(0.2)
    value_clip_range: float = positive(0.2)
    value_coef: float = at_least_zero(0.1)
    whiten_rewards: bool = True
    whiten_advantages: bool = True
    missing_eos_penalty: float = at_least_zero(0.0)
    score_normalization: str = choice("none", "scale", "standardize")
    score_clip: float | None = optional_positive()
    accumulation: str = choice("exact", "as_published")
    published_rows: int = positive(16)
    value_model: str = choice("adapter", "trunk_head", "full")
    target_kl: float | None = field(
        default=None, metadata={"check": lambda x: x is None or x > 0, "allowed": "null or a number above 0"}
    )
    eval_every: int = positive()
    keep_best: str | None = "auto"
    keep_best_mode: str = choice("max", "min")
    reference_every: int = positive(10)


@dataclass
class DivergenceSettings:
    """`conf/divergence`: the function, and whether it sees log-probs of the sampled token, whole logits, or nothing."""

    name: str = omegaconf.MISSING
    function: str = omegaconf.MISSING
    input: str = choice("logprobs", "logits", "none")


@dataclass
class GenerationSettings:
    """`conf/generation`: how rollouts are sampled (top-k and top-p are absent on purpose: they would bias every KL)."""

    engine: str = choice("native", "transformers", "vllm")
    max_new_tokens: int = positive()
    temperature: float = positive(1.0)
    batch_size: int = positive(64)
    capture_logprobs: str = choice("auto", "always", "never")
    cuda_graphs: str = choice("never", "auto")
    vllm: dict[str, Any] = field(
        default_factory=lambda: {"gpu_memory_utilization": 0.4},
        metadata={
            "check": lambda x: 0 < _number(x.get("gpu_memory_utilization")) < 1,
            "allowed": "keywords of vllm.LLM, gpu_memory_utilization being a number between 0 and 1",
        },
    )


@dataclass
class EvaluationSettings:
    """`conf/evaluation`: what is measured at step 0, every `ppo.eval_every` steps and at the end.

    `factscore` (evaluation=factscore) is checked by its own class.
    """

    temperature: float = at_least_zero(0.0)
    max_new_tokens: int = positive()
    prompts: int = positive()
    kl_prompts: int = positive()
    best_of: int = positive(1)
    samples: int = at_least_zero(20)
    factscore: dict[str, Any] | None = None
    difficulty: str | None = None


@dataclass
class GuardSettings:
    """A key of `conf/guards`: what happens when the guard finds something, and how many values it looks at."""

    action: str = choice("off", "warn", "stop")
    window: int = positive()

    def __post_init__(self) -> None:
        if self.action == "False":  # what YAML makes of a bare off
            self.action = "off"


@dataclass
class LimitGuard(GuardSettings):
    """A guard with a threshold."""

    limit: float = at_least_zero()


@dataclass
class GapGuard(LimitGuard):
    """A guard whose threshold is another where weights or matrix products are not float32."""

    limit_low_precision: float = at_least_zero()


@dataclass
class GuardsSettings:
    """`conf/guards`: see there for what each of them finds (a setting made by hand has them off)."""

    non_finite: GuardSettings = field(default_factory=GuardSettings)
    first_ratio: LimitGuard = field(default_factory=LimitGuard)
    sampling_gap: GapGuard = field(default_factory=GapGuard)
    negative_kl: LimitGuard = field(default_factory=LimitGuard)
    large_kl: LimitGuard = field(default_factory=LimitGuard)
    repetition: LimitGuard = field(default_factory=LimitGuard)
    length_cap: LimitGuard = field(default_factory=LimitGuard)
    overoptimization: LimitGuard = field(default_factory=LimitGuard)
    linear_range: LimitGuard = field(default_factory=LimitGuard)
    entropy_collapse: LimitGuard = field(default_factory=LimitGuard)
    entropy_rise: LimitGuard = field(default_factory=LimitGuard)
    explained_variance: LimitGuard = field(default_factory=LimitGuard)
    spike: LimitGuard = field(default_factory=LimitGuard)

    def at_precision(self, float32: bool) -> "GuardsSettings":
        """With the limit of `sampling_gap` that holds for the precision of the model."""
        gap = self.sampling_gap
        return self if float32 else replace(self, sampling_gap=replace(gap, limit=gap.limit_low_precision))


@dataclass
class Settings:
    """Everything the stages read, resolved."""

    seed: int = seed()
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    sft: SFTSettings = field(default_factory=SFTSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    ppo: PPOSettings = field(default_factory=PPOSettings)
    divergence: DivergenceSettings = field(default_factory=DivergenceSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    guards: GuardsSettings = field(default_factory=GuardsSettings)
    quantization: dict[str, Any] | None = None


def typed(schema: type[T], values: Mapping[Any, Any], prefix: str = "") -> T:
    """The values as an object of their schema, every one of them checked; `prefix` goes before the keys in errors.

    Raises:
        ConfigError: a key that does not exist, a value of the wrong type or outside what is allowed.
    """
    structure = OmegaConf.structured(schema)
    _check_groups(values, structure, prefix)
    try:
        settings: T = OmegaConf.to_object(OmegaConf.merge(structure, values))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key, message = error.full_key or "", str(error).partition("\n")[0]
        if "not in" in message:
            parent = OmegaConf.select(structure, key.rpartition(".")[0])
            raise ConfigError(unknown_key(f"{prefix}{key}", parent or ())) from error
        raise ConfigError(f"{prefix}{key}: {message}") from error
    check_values(settings, prefix)
    return settings


def _check_groups(values: Mapping[Any, Any], schema: DictConfig, prefix: str) -> None:
    """Where keys of their own are wanted no single value will do: OmegaConf's error would not name the place."""
    for key, value in values.items():
        node = schema.get(key) if key in schema else None
        if isinstance(node, DictConfig) and isinstance(value, dict):
            _check_groups(value, node, f"{prefix}{key}.")
        elif isinstance(node, DictConfig) and value is not None:
            raise ConfigError(
                f"{prefix}{key}={value} is not allowed; allowed: keys below it ({', '.join(sorted(map(str, node)))})"
            )


def check_values(settings: Any, prefix: str = "") -> None:
    """Check every field against what its declaration allows.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    for item in fields(settings):
        value, key = getattr(settings, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            check_values(value, f"{key}.")
        elif isinstance(value, dict) and "check" not in item.metadata:
            for name, part in value.items():
                if is_dataclass(part):
                    check_values(part, f"{key}.{name}.")
        elif value == omegaconf.MISSING:
            raise ConfigError(f"{key} has no value; allowed: {item.metadata.get('allowed', 'a value')}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not allowed; allowed: {item.metadata.get('allowed', 'a number')}")
        elif "check" in item.metadata and not item.metadata["check"](value):
            raise ConfigError(f"{key}={value} is not allowed; allowed: {item.metadata['allowed']}")


def is_quantized(quantization: Mapping[str, Any] | None) -> bool:
    """Whether the frozen base is held in int8 or nf4."""
    return any(value for key, value in (quantization or {}).items() if key.startswith("load_in_"))
