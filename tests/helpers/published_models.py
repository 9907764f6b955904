"""The shapes of published models, as their `config.json` has them, and stand-ins for them in a cache of the Hub."""

from pathlib import Path
from typing import Any

from tests.helpers.hub_cache import on_the_hub
from tests.helpers.zoo import save_animal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def shape(
    kind: str, hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, **more,
    }  # fmt: skip


# option of conf/model → the published shape, the number of parameters in millions that follows from it, a relative in
# the zoo. The numbers of parameters are those of the model cards (of Qwen3 and Gemma 3: with embeddings, once if tied;
# of gemma3_4b: KerasHub's 3,880,099,328 of the text model, and the 64 further rows of the Hub's embedding).
PUBLISHED = {
    "qwen3_0_6b": (shape("qwen3", 1024, 3072, 28, 16, 8, 151936, True, head_dim=128), 596, "qwen3"),
    "qwen3_1_7b": (shape("qwen3", 2048, 6144, 28, 16, 8, 151936, True, head_dim=128), 1721, "qwen3"),
    "qwen3_8b": (shape("qwen3", 4096, 12288, 36, 32, 8, 151936, False, head_dim=128), 8191, "qwen3"),
    "llama3_2_1b": (shape("llama", 2048, 8192, 16, 32, 8, 128256, True, head_dim=64), 1236, "llama3"),
    "llama3_1_8b": (shape("llama", 4096, 14336, 32, 32, 8, 128256, False), 8030, "llama3"),
    "gemma3_1b": (shape("gemma3_text", 1152, 6912, 26, 4, 1, 262144, True, head_dim=256, sliding_window=512), 1000,
                  "gemma3"),
    "gemma3_4b": (shape("gemma3_text", 2560, 10240, 34, 8, 4, 262208, True, head_dim=256, sliding_window=1024), 3880,
                  "gemma3"),
    "smollm2_135m": (shape("llama", 576, 1536, 30, 9, 3, 49152, True), 135, "smollm2"),
    "smollm2_360m": (shape("llama", 960, 2560, 32, 15, 5, 49152, True), 362, "smollm2"),
    "smollm2_1_7b": (shape("llama", 2048, 8192, 24, 32, 32, 49152, True), 1711, "smollm2"),
    "smollm3_3b": (shape("smollm3", 2048, 11008, 36, 16, 4, 128256, True), 3075, "smollm3"),
    "olmo2_1b": (shape("olmo2", 2048, 8192, 16, 16, 16, 100352, False), 1485, "olmo2"),
    "pythia_1b": (shape("gpt_neox", 2048, 8192, 16, 8, 8, 50304, False), 1012, "gpt_neox"),
}  # fmt: skip


def publish_relative(option: str, name: str, home: Path, folder: Path) -> None:
    """Put a tiny random relative of a model into a home of the Hub's cache under its published name."""
    on_the_hub(home / "hub", name, {COMMIT: save_animal(PUBLISHED[option][2], folder)})
