"""What an adapter can be on a base that several roles share, checked before any model is loaded."""

from collections.abc import Iterator

from omegaconf import DictConfig
from transformers import PreTrainedModel

from rlhf.distributed import processes
from rlhf.errors import ConfigError
from rlhf.models.export import REWRITING
from rlhf.models.linear_layers import linear_names, target_names
from rlhf.schema import ALL_LINEAR
from rlhf.settings import LoraSettings, Settings, is_quantized

INITS = ("default", "gaussian")


def _adapters(settings: Settings) -> Iterator[tuple[str, LoraSettings]]:
    """The adapters of all stages, by the keys that configure them; not whole models."""
    loras = {"lora": settings.lora, "reward.lora": settings.reward.lora, "sft.lora": settings.sft.lora}
    return ((key, lora) for key, lora in loras.items() if lora.r)


def check_adapters(config: DictConfig, settings: Settings) -> None:
    """Check what each adapter asks for, whatever the model is.

    Raises:
        ConfigError: it would change the shared base, or cannot be run as the rest of the configuration asks.
    """
    for key, lora in _adapters(settings):
        if lora.modules_to_save:
            raise ConfigError(
                f"{key}.modules_to_save={lora.modules_to_save}: a module that is trained as a whole would be another "
                "one for each role on the shared base, and embeddings and language-model head are read in common; "
                "allowed: null, or lora=none, which trains everything"
            )
        if lora.init.lower().startswith(REWRITING):
            raise ConfigError(
                f"{key}.init={lora.init} moves a part of the base's weights into the adapter, and the base is shared: "
                f"reference, reward model and value function would change with it; allowed: {' or '.join(INITS)}"
            )
        if lora.init not in INITS:
            raise ConfigError(f"{key}.init={lora.init} is not allowed; allowed: {' or '.join(INITS)}")
        if lora.dora:
            _check_dora(config, settings, key)


def _check_dora(config: DictConfig, settings: Settings, key: str) -> None:
    """DoRA reads the weights of the base itself."""
    reasons = {
        "quantization=none": (is_quantized(settings.quantization), "cannot be merged into rounded weights"),
        "trainer=ddp": (processes.num_shards(config.trainer) > 1, "is untested with trainer=fsdp"),
        "model.compile=false": (settings.model.compile, "is untested with model.compile=true"),
        "generation.engine=native": (settings.generation.engine == "vllm", "is no adapter that vLLM loads"),
    }
    for allowed, (wrong, why) in reasons.items():
        if wrong:
            raise ConfigError(f"{key}.dora=true: DoRA {why}; allowed: {allowed}, or {key}.dora=false")


def check_layers(settings: Settings, lm: PreTrainedModel) -> None:
    """Check that the model has the layers that adapters are to be put on.

    Raises:
        ConfigError: one of them does not exist.
    """
    present, blocks = linear_names(lm), lm.config.get_text_config().num_hidden_layers
    for key, lora in _adapters(settings):
        absent = sorted(target_names(lora, lm) - present)
        if absent:
            raise ConfigError(
                f"{key}.target_modules: between embeddings and last hidden states there is no linear layer named "
                f"{', '.join(absent)} that an adapter fits; "
                f"allowed: {ALL_LINEAR}, or some of {', '.join(sorted(present))}"
            )
        chosen = lora.layers_to_transform
        if chosen is not None and not (chosen and set(chosen) <= set(range(blocks))):
            raise ConfigError(
                f"{key}.layers_to_transform={chosen}: the model has blocks 0 to {blocks - 1}; allowed: some of them, "
                "or null for all"
            )
