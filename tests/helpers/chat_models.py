"""Byte-level tokenizers with chat templates of the kinds that published models have."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.helpers.tiny_models import SHAPE
from tests.helpers.tiny_tokenizers import byte_level

# `<|im_start|>role`, a system prompt of its own, a line break after each turn (SmolLM2, Qwen2).
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The same with an empty block of thoughts before the last answer, which the prompt has if thinking is off (Qwen3).
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# BOS, a header for the role, trimmed contents, nothing behind a turn (Llama 3).
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Another name for the assistant, no system message, turns that must alternate (Gemma).
MODEL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Brackets around the user's turn only, EOS behind the assistant's (Mistral).
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Words, and EOS behind each turn (Zephyr).
WORDS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# A channel before the answer, and another end of the last turn than of earlier ones (gpt-oss).
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# name → template, special tokens, their roles
KINDS = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|endoftext|>"}),
    "thinking": (THINKING, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    "headers": (
        HEADERS,
        ["<|bos|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|bos|>", "eos_token": "<|end_of_text|>"},
    ),
    "model": (
        MODEL,
        ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "brackets": (BRACKETS, ["<s>", "</s>", "[INST]", "[/INST]"], {"bos_token": "<s>", "eos_token": "</s>"}),
    "words": (WORDS, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}),
    "channels": (
        CHANNELS,
        ["<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
        {"eos_token": "<|return|>"},
    ),
}


def chat_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the template and special tokens of a kind; one with a BOS puts it in front of every text."""
    template, special, roles = KINDS[kind]
    tokenizer = byte_level(*special, **roles)
    tokenizer.chat_template = template
    if tokenizer.bos_token:
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    return tokenizer


def save_chat_tokenizer(kind: str, folder: Path) -> Path:
    """Save the tokenizer of a kind, and return the folder."""
    chat_tokenizer(kind).save_pretrained(folder)
    return folder


def save_chat_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny random Llama with the tokenizer of a kind; it stops at EOS and at the end of a turn."""
    tokenizer = chat_tokenizer(kind)
    shape = {**SHAPE, "num_hidden_layers": 2, "max_position_embeddings": 512, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return save_chat_tokenizer(kind, folder)
