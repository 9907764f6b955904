"""Fixtures shared by all tests. Shape annotations of the package are checked at run time."""
# ruff: noqa: E402

import gc
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Also for the programs that tests start: more threads than cores would be far slower.
os.environ["OMP_NUM_THREADS"] = "1"

from importlib.util import find_spec

from jaxtyping import install_import_hook

import tests.helpers.typechecker  # noqa: F401  (the hook looks it up but does not import it)

PACKAGE = Path(find_spec("rlhf").origin).parent  # type: ignore[union-attr, arg-type]
# Only modules that annotate shapes: elsewhere the check would replace the error messages that users get to see,
# and checking the many rows of the farm would triple the time they take.
SHAPED = [
    ".".join(["rlhf", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for file in PACKAGE.rglob("*.py")
    if "from jaxtyping" in file.read_text()
]
install_import_hook(SHAPED, "tests.helpers.typechecker.checked")

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf.models.export import save_adapter, save_model
from rlhf.models.roles import Roles
from rlhf.models.sequences import Sequences
from tests.helpers.command_line import run_in_process
from tests.helpers.composing import map_choices_where_they_are_used, read_each_file_once
from tests.helpers.tiny_models import random_sequences, tiny_lora, tiny_model, tiny_roles, word_tokenizer

torch.set_num_threads(1)
read_each_file_once()
map_choices_where_they_are_used()


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
    """Folders of an SFT model and a reward adapter as earlier stages write them, and policy weights to start from."""
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


# Files with few but long tests start first, so that no worker ends up alone with one of them.
LONG = ("test_crash.py", "test_slurm.py", "test_sweep.py", "test_end_to_end.py", "test_disk.py", "test_shared.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with the longest tests first."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Spare what all tests have imported from the garbage collector, which would take half a second to look at it."""
    gc.freeze()
