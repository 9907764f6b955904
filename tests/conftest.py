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
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.models.export import save_adapter, save_model
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from tests.helpers.command_line import run_in_process
from tests.helpers.tiny_models import random_sequences, tiny_lora, tiny_model, tiny_roles, word_tokenizer

torch.set_num_threads(1)


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
    return random_sequences


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
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """Run `rlhf` in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = run_in_process(*arguments)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


# files of few, long tests: begun first, so that no worker is left alone with one of them
LONG = ("test_crash.py", "test_slurm.py", "test_sweep.py", "test_end_to_end.py", "test_disk.py", "test_shared.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    items.sort(key=lambda item: item.path.name not in LONG)
