"""The zoo: a tiny random model of every family that people name, each with a tokenizer and texts of its kind."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.chat_models import chat_tokenizer
from tests.helpers.tiny_architectures import GEMMA, HALF, HYBRID, WINDOW, tiny_architecture
from tests.helpers.tiny_tokenizers import byte_level, gpt2, llama

END = "<|endoftext|>"
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {  # latent attention: values of another width than keys
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": 4,
}  # fmt: skip
GEMMA_3N = {
    "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 261, "intermediate_size": [64, 64],
    "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip
GEMMA_4 = {
    "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 261,
    "num_kv_shared_layers": 0,
}  # fmt: skip
LINEAR_HEADS = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def opt_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's bytes with `</s>` as BOS and EOS, in front of every text, as in OPT."""
    tokenizer = byte_level("<pad>", "</s>", bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    return tokenizer


def bloom_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level("<unk>", "<s>", "</s>", "<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                      pad_token="<pad>")  # fmt: skip


def cohere_tokenizer() -> PreTrainedTokenizerFast:
    """A BOS in front of every text, and EOS at the end of a turn."""
    tokenizer = byte_level("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", pad_token="<PAD>",
                           bos_token="<BOS_TOKEN>", eos_token="<|END_OF_TURN_TOKEN|>")  # fmt: skip
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    return tokenizer


@dataclass(frozen=True)
class Kind:
    """A family: transformers' model type, what distinguishes its configuration, and its kind of tokenizer.

    `engine` is what it is sampled with. `classifier` says whether transformers has a sequence classifier of it.
    """

    model_type: str
    options: dict[str, Any]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    engine: str = "native"
    classifier: bool = True


ZOO = {
    "llama2": Kind("llama", {"num_key_value_heads": 4}, llama),
    "llama3": Kind("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
                   partial(chat_tokenizer, "headers")),
    "qwen2": Kind("qwen2", {"tie_word_embeddings": True}, partial(chat_tokenizer, "chatml")),
    "qwen2 with a window": Kind("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
                                partial(chat_tokenizer, "chatml")),
    "qwen3": Kind("qwen3", {"head_dim": 16, "tie_word_embeddings": True}, partial(chat_tokenizer, "thinking")),
    "gemma2": Kind("gemma2", {**GEMMA, **HALF, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 3.0},
                   partial(chat_tokenizer, "model")),
    "gemma3": Kind("gemma3_text", {**GEMMA, **HALF, "tie_word_embeddings": True}, partial(chat_tokenizer, "model")),
    "mistral": Kind("mistral", WINDOW, partial(chat_tokenizer, "brackets")),
    "phi3": Kind("phi3", {}, llama),
    "phi3 with a window": Kind("phi3", WINDOW, llama),
    "gpt2": Kind("gpt2", {}, gpt2),
    "gpt_neox": Kind("gpt_neox", {"rotary_pct": 0.25}, partial(byte_level, END, bos_token=END, eos_token=END)),
    "opt": Kind("opt", {"ffn_dim": 64}, opt_tokenizer),
    "opt-350m": Kind("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, opt_tokenizer),
    "granite": Kind("granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                                "attention_multiplier": 0.2}, gpt2, classifier=False),
    "cohere": Kind("cohere", {"logit_scale": 0.0625, "use_qk_norm": True}, cohere_tokenizer,
                   classifier=False),
    "cohere2": Kind("cohere2", {"logit_scale": 0.25, "head_dim": 8, **HALF}, cohere_tokenizer, classifier=False),
    "olmo2": Kind("olmo2", {}, gpt2),
    "olmo3": Kind("olmo3", HALF, gpt2),
    "smollm2": Kind("llama", {"num_attention_heads": 4, "tie_word_embeddings": True},
                    partial(chat_tokenizer, "chatml")),
    "smollm3": Kind("smollm3", {"no_rope_layers": [1, 0]}, partial(chat_tokenizer, "chatml")),
    "starcoder2": Kind("starcoder2", {**WINDOW, "tie_word_embeddings": True}, gpt2),
    "falcon": Kind("falcon", {"multi_query": True, "new_decoder_architecture": False}, gpt2),
    "falcon with alibi": Kind("falcon", {"alibi": True, "multi_query": False, "bias": True}, gpt2),
    "bloom": Kind("bloom", {"n_layer": 2, "n_head": 4}, bloom_tokenizer),
    "mixtral": Kind("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}, llama),
    "qwen3_moe": Kind("qwen3_moe", {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1, **EXPERTS},
                      partial(chat_tokenizer, "thinking")),
    "deepseek_v3": Kind("deepseek_v3", {**LATENT, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                                        "first_k_dense_replace": 1, **EXPERTS}, gpt2),
    "gpt_oss": Kind("gpt_oss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, **HALF},
                    partial(chat_tokenizer, "channels")),
    "gemma3n": Kind("gemma3n_text", {**GEMMA_3N, **HALF}, partial(chat_tokenizer, "model"), classifier=False),
    "gemma4": Kind("gemma4_text", {**GEMMA_4, **HALF}, partial(chat_tokenizer, "model"), classifier=False),
    "phimoe": Kind("phimoe", {"num_local_experts": 3, "num_experts_per_tok": 2}, llama),
    "qwen3_5": Kind("qwen3_5_text", {**LINEAR_HEADS, "layer_types": ["linear_attention", "full_attention"]},
                    partial(chat_tokenizer, "thinking"), "transformers"),
    "qwen3_next": Kind("qwen3_next", {**LINEAR_HEADS, "layer_types": ["linear_attention", "full_attention"],
                                      "num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
                       partial(chat_tokenizer, "thinking"), "transformers"),
    "falcon_h1": Kind("falcon_h1", HYBRID, gpt2, "transformers", classifier=False),
}  # fmt: skip


def animal(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The random model of a family, and its tokenizer."""
    kind = ZOO[name]
    tokenizer = kind.tokenizer()
    special = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    return tiny_architecture(kind.model_type, **{**special, "max_position_embeddings": 256, **kind.options}), tokenizer


def save_animal(name: str, folder: Path) -> Path:
    """Save the model and tokenizer of a family as its authors would have, and return the folder."""
    model, tokenizer = animal(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
