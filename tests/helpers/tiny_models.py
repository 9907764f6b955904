"""Tiny random models, their roles and adapters, random sequences and a tokenizer with one token per word."""

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences

PAD, EOS, UNK = 0, 1, 2

VOCABULARY = 50

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "tied": ["q_proj", "v_proj", "down_proj"],
    "neox": ["query_key_value", "dense"],
}

SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}

# far larger initial weights than usual, so that distributions are peaked and every position matters
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "initializer_range": 0.25}


def tiny_model(kind: str = "llama", seed: int = 0, layers: int = 2, **options: object) -> PreTrainedModel:
    """A random float32 model without dropout: `llama` (grouped-query, untied), `tied` (Llama) or `neox`."""
    shape = {**SHAPE, **SPECIAL, "num_hidden_layers": layers, "max_position_embeddings": 256}
    if kind == "neox":
        config = GPTNeoXConfig(**shape, rotary_pct=0.5, attention_dropout=0.0, hidden_dropout=0.0)
    else:
        config = LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=kind == "tied")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def randomize_lora_b(parameters: dict[str, torch.nn.Parameter], seed: int, std: float = 0.2) -> None:
    """Draw LoRA's B matrices, which are zero at first, so that the adapter changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in parameters.items():
        if "lora_B" in key:
            parameter.data.normal_(std=std, generator=generator)


def tiny_lora(kind: str = "llama", dropout: float = 0.0, r: int = 4) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(TARGETS[kind]))


def tiny_roles(kind: str = "llama", dropout: float = 0.0, **options: object) -> Roles:
    """Non-zero adapters `policy`, `value` and `reward` on one base, with heads; policy and value are trainable."""
    roles = Roles(tiny_model(kind, **options))
    for seed, name in enumerate(("policy", "value", "reward")):
        with torch.random.fork_rng():  # peft draws A from the global generator, whose state depends on earlier tests
            torch.manual_seed(seed)
            roles.add_adapter("base", name, tiny_lora(kind, dropout))
        randomize_lora_b(roles.adapter_parameters("base", name), seed)
        roles.table[name] = Role("base", name)
    for seed, name in enumerate(("value", "reward")):
        head = roles.add_head(name, zero=False)
        head.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    roles.train_only("policy", "value")
    return roles.eval()


def random_sequences(
    rows: int, seed: int, prompt: tuple[int, int] = (1, 9), response: tuple[int, int] = (1, 12)
) -> Sequences:
    """Random sequences of ordinary words with different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(UNK + 1, VOCABULARY, (length,), generator=generator).tolist()

    return Sequences.from_lists([words(*prompt) for _ in range(rows)], [words(*response) for _ in range(rows)])


def word_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token per word (w3 is 3), no special tokens added; with `pad="<eos>"` the pad token is the EOS token."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="<eos>", unk_token="<unk>")
