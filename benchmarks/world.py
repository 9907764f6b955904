"""Models of given shapes with random weights, reward adapters on them and prompts, in a folder or in memory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.models.assembly import lora_config
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import DTYPES, _keep_nf4_differentiable, switch_off_dropout
from rlhf.models.roles import Role, Roles
from rlhf.seeding import generator
from rlhf.settings import LoraSettings, Settings, is_quantized

PAD, EOS, UNK = 0, 1, 2
NEVER = -30.0  # a logit of EOS with which no response ends before its limit
CARRIER = 0.5  # value of the constant hidden unit in `_set_eos`
ATTENTION = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt_neox": ["query_key_value", "dense"]}


def llama(layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a `LlamaConfig`."""
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "max_position_embeddings": 1024, "tie_word_embeddings": False, **options,
    }  # fmt: skip


SHAPES = {
    "toy": llama(2, 64, 4, 128, 200),
    "farm": llama(4, 96, 4, 256, 400),
    "3.7M": llama(4, 256, 4, 544, 2000),
    "16M": llama(6, 384, 6, 1024, 8000),
    "110M": llama(12, 768, 12, 2048, 16000),
    "smollm2_135m": llama(30, 576, 9, 1536, 49152, num_key_value_heads=3),
    "llama_7b": llama(32, 4096, 32, 11008, 32000),
    "gpt_neox_20b": {
        "model_type": "gpt_neox", "num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads": 64,
        "intermediate_size": 24576, "vocab_size": 50432, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "rotary_pct": 0.25,
    },
    "toy_neox": {
        "model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 200, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """A folder with a random "SFT model", a reward adapter on it and prompts, readable by any PPO implementation."""

    folder: Path

    @property
    def sft(self) -> Path:
        """Folder of the SFT model and its tokenizer, in the format of transformers."""
        return self.folder / "sft"

    @property
    def reward(self) -> Path:
        """Folder of the reward adapter in the format of PEFT: its update is zero, its head `score` is random."""
        return self.folder / "reward"

    @property
    def prompts(self) -> list[str]:
        """Prompts of words that are one token each."""
        return json.loads((self.folder / "prompts.json").read_text())


def make_world(
    folder: Path,
    shape: Mapping[str, Any],
    prompt_tokens: tuple[int, int],
    eos_logit: float = NEVER,
    rows: int = 256,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> World:
    """Write model, reward adapter and prompts into `folder`, unless they exist.

    Args:
        folder: of the world.
        shape: the model's configuration, a value of `SHAPES`.
        prompt_tokens: shortest and longest prompt.
        eos_logit: logit of EOS after any text.
        rows: number of prompts.
        device: where the weights are drawn.
        dtype: of the weights.
        seed: of weights and prompts.
    """
    world = World(folder)
    if (folder / "prompts.json").exists():
        return world
    tokenizer = word_tokenizer(shape["vocab_size"])
    torch.manual_seed(seed)
    with torch.device(device):
        config = AutoConfig.for_model(**shape, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prompts = random_prompts(rows, prompt_tokens, shape["vocab_size"], seed)
    _set_eos(model, tokenizer(prompts[:8])["input_ids"], eos_logit)
    return save_world(world, model, tokenizer, prompts)


def save_world(
    world: World, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> World:
    """Write a model, a new reward adapter on it and, as a sign of completeness last, the prompts."""
    save_model(model, tokenizer, world.sft)
    lora = reward_lora(model)
    roles = Roles(model)
    roles.add_adapter("base", "reward", lora)
    roles.table["reward"] = Role("base", "reward")
    roles.add_head("reward", zero=False)
    save_adapter(roles, "reward", lora, world.sft, tokenizer, world.reward)
    (world.folder / "prompts.json").write_text(json.dumps(list(prompts)))
    return world


def random_prompts(rows: int, tokens: tuple[int, int], vocabulary: int, seed: int = 0) -> list[str]:
    """Prompts of random words, with lengths uniform from `tokens[0]` to `tokens[1]` inclusive."""
    stream = generator(seed, "benchmark prompts")
    lengths = torch.randint(tokens[0], tokens[1] + 1, (rows,), generator=stream).tolist()
    return [
        " ".join(f"w{i}" for i in torch.randint(UNK + 1, vocabulary, (n,), generator=stream).tolist()) for n in lengths
    ]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word (w3 is token 3), so that prompts can have any exact length."""
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK} | {f"w{i}": i for i in range(UNK + 1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@torch.no_grad()
def _set_eos(model: PreTrainedModel, prompts: Sequence[Sequence[int]], logit: float) -> None:
    """Change the weights so that EOS has about this logit after any text: every program samples the same lengths.

    The first hidden unit carries a constant: all embeddings contain it, no layer writes to it, and only EOS's row of
    the output matrix reads it.
    """
    # 1. the constant goes in
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings.weight[:, 0] = CARRIER
    # 2. no layer adds to it
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj", "attention.dense", "dense_4h_to_h")):
            module.weight[0] = 0
            if module.bias is not None:
                module.bias[0] = 0
    # 3. its value behind the last norm, and the weight that turns it into the logit
    first: list[Tensor] = []
    for ids in prompts:
        row = torch.tensor([ids], device=model.device)
        first.append(model.base_model(input_ids=row).last_hidden_state[0, len(ids) // 2 :, 0].float())
    output.weight[:, 0] = 0
    output.weight[EOS] = 0
    output.weight[EOS, 0] = logit / torch.cat(first).mean()


def reward_lora(model: PreTrainedModel) -> LoraConfig:
    """The configuration of a reward adapter on `model`."""
    return lora_config(LoraSettings(r=8, alpha=64.0, target_modules=ATTENTION[model.config.model_type]), model)


# -- in memory ---------------------------------------------------------------------------------------------------------


def random_roles(shape: Mapping[str, Any], settings: Settings, device: str) -> Roles:
    """The roles of a PPO run with LoRA on a random base that is drawn on `device`: no file is written or read.

    Responses never end before their limit. A quantised base has the same weights in all its blocks.
    """
    quantization = settings.quantization if is_quantized(settings.quantization) else None
    base = _quantised(shape, settings, quantization, device) if quantization else _plain(shape, settings, device)
    switch_off_dropout(base)
    base.config.use_cache = True
    roles = Roles(base.eval(), DTYPES[settings.model.dtype])
    own = lora_config(settings.lora, base)
    adapters = {"reward": reward_lora(base), "policy": own, "value": own}
    for role, config in adapters.items():
        roles.add_adapter("base", role, config)
        roles.table[role] = Role("base", role)
    roles.add_head("reward", zero=False)
    roles.add_head("value", zero=True)
    roles.train_only("policy", "value")
    if settings.model.gradient_checkpointing:
        roles.checkpoint_activations()
    if settings.model.compile:
        roles.compile_blocks()
    return roles.to(device)


def _plain(shape: Mapping[str, Any], settings: Settings, device: str) -> PreTrainedModel:
    """A random model whose EOS is never likely."""
    config = AutoConfig.for_model(**shape, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.model.dtype]).eval()
    _set_eos(model, [[UNK + 1 + i for i in range(8)]], NEVER)
    return model


def _quantised(
    shape: Mapping[str, Any], settings: Settings, quantization: Mapping[str, Any], device: str
) -> PreTrainedModel:
    """A model whose blocks are copies of one random block, quantised by transformers as if read from a file."""
    single = _plain({**shape, "num_hidden_layers": 1}, settings, device)
    weights: dict[str, Tensor] = {}
    for name, weight in single.state_dict().items():
        numbers = range(shape["num_hidden_layers"]) if ".layers.0." in name else [0]
        weights |= {name.replace(".layers.0.", f".layers.{i}."): weight for i in numbers}
    config = AutoConfig.for_model(**shape, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
    model = type(single).from_pretrained(
        None, config=config, state_dict=weights, dtype=DTYPES[settings.model.dtype],
        quantization_config=BitsAndBytesConfig(**quantization), device_map={"": single.device},
    )  # fmt: skip
    _keep_nf4_differentiable(model)
    return model
