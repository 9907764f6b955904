"""The language model of a checkpoint that reads images or sound, too, such as Gemma 3 of 4 billion parameters or more.

Nothing here reads anything but text, so the language model is loaded alone: no memory for the other parts, no adapters
on them, and what is saved is a plain language model.
"""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

# Where such checkpoints keep the weights of their language model → where a plain one has them (`key_mapping`).
RENAMED = {
    r"^(?:model\.)?language_model\.(?:model\.)?(?!lm_head)": "model.",
    r"^(?:model\.)?language_model\.lm_head": "lm_head",
}
OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # keys that the whole decides


def language_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the language model alone; `config` itself if there is nothing beside it.

    It is `config`, too, if transformers takes the language model out of such a checkpoint by itself, or has no causal
    language model of this kind, which is refused when it is made.
    """
    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or not _has_other_parts(config):
        return config
    for key in OF_THE_WHOLE:
        if (value := getattr(config, key, None)) is not None:
            setattr(text, key, value)
    return text


def _has_other_parts(config: PreTrainedConfig) -> bool:
    """Whether transformers' causal language model of this kind, if it has one, reads more than text."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return kind is None or kind.config_class is type(config)
