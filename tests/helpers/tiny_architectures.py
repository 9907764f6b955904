"""Tiny random models of many architectures, with peaked distributions so that every position and scale matters."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SPECIAL = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
HALF = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HYBRID = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}  # fmt: skip
# models that scale or cap their logits
TRANSFORMED = {
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25, "head_dim": 8},
    "gemma2": {**GEMMA, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "final_logit_softcapping": 3.0},
    "minicpm3": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "num_key_value_heads": 4, "dim_model_base": 8,
    },
    "falcon_h1": {**HYBRID, "lm_head_multiplier": 0.1},
}  # fmt: skip
# models with local attention, or whose attention depends on distance
LOCAL = {
    "mistral": WINDOW,
    "phi3": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {**GEMMA, **HALF},
    "gemma3_text": {**GEMMA, **HALF},
    "cohere2": {"head_dim": 8, **HALF},
    "olmo3": HALF,
    "exaone4": HALF,
    "gpt_oss": {"head_dim": 8, **EXPERTS, **HALF},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
}
# models with a recurrent state, which padding would change
STATEFUL = {
    "mamba": {"state_size": 8},
    "falcon_h1": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64, "conv_L_cache": 3},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
}


def tiny_architecture(kind: str, **options: object) -> PreTrainedModel:
    """A random float32 model of transformers' model type `kind`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**SPECIAL, **SHAPE, **options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
