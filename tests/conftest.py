"""Tiny models, roles and a word-level tokenizer; every shape annotation of the package is checked at run time."""
# ruff: noqa: E402

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start too: more threads than cores are far slower

from importlib.util import find_spec

from jaxtyping import install_import_hook

import tests.helpers.typechecker  # noqa: F401  (the hook looks it up and does not import it)

PACKAGE = Path(find_spec("rlhf").origin).parent  # type: ignore[union-attr, arg-type]
# the modules that annotate shapes, and no others: a check that users do not have would hide what a mistake tells them,
# and that of the farm's many rows would triple their time
SHAPED = [
    ".".join(["rlhf", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if "from jaxtyping" in file.read_text()
]
install_import_hook(SHAPED, "tests.helpers.typechecker.checked")

import pytest
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

from rlhf.models.export import save_adapter, save_model
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from tests.helpers.tiny_runs import rlhf

torch.set_num_threads(1)

PAD, EOS, UNK = 0, 1, 2
VOCABULARY = 50
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "tied": ["q_proj", "v_proj", "down_proj"],
    "neox": ["query_key_value", "dense"],
}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
# initial weights far larger than usual, so that distributions are peaked and every position matters
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


def randomise(parameters: dict[str, torch.nn.Parameter], seed: int, std: float = 0.2) -> None:
    """Give B matrices weight, so that an adapter is no no-op."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in parameters.items():
        if "lora_B" in key:
            parameter.data.normal_(std=std, generator=generator)


def tiny_lora(kind: str = "llama", dropout: float = 0.0, r: int = 4) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(TARGETS[kind]))


def tiny_roles(kind: str = "llama", dropout: float = 0.0, **options: object) -> Roles:
    """`policy`, `value` and `reward` as adapters that matter, on one base, with heads; policy and value train."""
    roles = Roles(tiny_model(kind, **options))
    for seed, name in enumerate(("policy", "value", "reward")):
        with torch.random.fork_rng():  # peft draws A from the global stream, whatever tests came before
            torch.manual_seed(seed)
            roles.add_adapter("base", name, tiny_lora(kind, dropout))
        randomise(roles.adapter_parameters("base", name), seed)
        roles.table[name] = Role("base", name)
    for seed, name in enumerate(("value", "reward")):
        head = roles.add_head(name, zero=False)
        head.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    roles.train_only("policy", "value")
    return roles.eval()


def random_texts(
    rows: int, seed: int, prompt: tuple[int, int] = (1, 9), response: tuple[int, int] = (1, 12)
) -> Sequences:
    """Ragged random sequences of ordinary words."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(UNK + 1, VOCABULARY, (length,), generator=generator).tolist()

    return Sequences.from_lists([words(*prompt) for _ in range(rows)], [words(*response) for _ in range(rows)])


def word_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a word (w3 is 3), no special tokens added; `pad="<eos>"` for a tokenizer whose pad token is its EOS."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNK} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return tiny_model


@pytest.fixture(scope="session")
def make_roles() -> Callable[..., Roles]:
    return tiny_roles


@pytest.fixture(scope="session")
def make_lora() -> Callable[..., LoraConfig]:
    return tiny_lora


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., Sequences]:
    return random_texts


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return word_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An SFT model and a reward adapter as earlier stages leave them, and a policy adapter to start from."""
    folder, roles, tokenizer = tmp_path_factory.mktemp("models"), tiny_roles(), word_tokenizer()
    save_model(roles.copy_trunk("reference"), tokenizer, folder / "sft")
    for role in ("reward", "policy"):
        save_adapter(roles, role, tiny_lora(), folder / "sft", tokenizer, folder / role)
    policy = roles.adapter_parameters("base", "policy")
    return SimpleNamespace(sft=folder / "sft", reward=folder / "reward", policy=policy, tokenizer=tokenizer)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """Run `rlhf` in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = rlhf(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# files of few, long tests: begun first, so that no worker is left alone with one of them
LONG = ("test_crash.py", "test_slurm.py", "test_sweep.py", "test_end_to_end.py", "test_disk.py", "test_shared.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    items.sort(key=lambda item: item.path.name not in LONG)
