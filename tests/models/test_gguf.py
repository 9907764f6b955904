"""A GGUF file as the base model: its weights and tokenizer, and a run from SFT to PPO."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rlhf.data.farm import Farm
from rlhf.models.loading import load_causal_lm, load_tokenizer, train_tokenizer
from rlhf.settings import ModelSettings
from tests.helpers.command_line import TINY, run_in_process

gguf = pytest.importorskip("gguf")
FILE = "tiny.gguf"
# names in the file: names in transformers
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in llama.cpp's order: rotated pairs are adjacent instead of half a head apart."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens[tokenizer.eos_token_id] = "<|endoftext|>"  # transformers would add it to a file without one
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in tokenizer.all_special_ids else 1 for i in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{short}": f"model.layers.{layer}.{long}" for short, long in NAMES.items()}
    for short, long in tensors.items():
        weight = weights[f"{long}.weight"]
        if "attn_q" in short or "attn_k" in short:
            weight = interleaved(weight, config.num_attention_heads)
        writer.add_tensor(f"{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM, PreTrainedTokenizerBase]:
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer((text for row in Farm().load("sft_validation") for text in row.values()), 400)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    write_gguf(model, tokenizer, folder / FILE)
    return folder, model, tokenizer


def test_weights_and_tokenizer_are_those_of_the_file(
    original: tuple[Path, LlamaForCausalLM, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    folder, model, tokenizer = original
    settings = ModelSettings(name="custom", name_or_path=str(folder), gguf_file=FILE)
    loaded_tokenizer = load_tokenizer(settings)
    text = "Mira Vale was born in 1921 ."
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded_tokenizer.eos_token_id == tokenizer.eos_token_id
    loaded = load_causal_lm(settings, loaded_tokenizer)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path)  # transformers refuses to save a model that is marked as quantised


@pytest.mark.long
def test_a_run_on_a_gguf_file_with_gradient_checkpointing(
    original: tuple[Path, LlamaForCausalLM, PreTrainedTokenizerBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages, with gradient checkpointing, on a base model from a GGUF file."""
    monkeypatch.chdir(tmp_path)
    shape = [word for word in TINY if not word.startswith("model.")]
    base = ["model=custom", f"model.name_or_path={original[0]}", f"model.gguf_file={FILE}"]
    assert run_in_process(*shape, *base, "model.max_prompt_tokens=64", "model.gradient_checkpointing=true") == 0
    (summary,) = tmp_path.glob("outputs/rlhf/*/summary.json")
    assert json.loads(summary.read_text())["metrics"]["eval/true_kl"] > 0
