"""Kernels are chosen before a model computes, by every command; `trainer.deterministic` changes no identity."""

import ast
import os
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf import root
from rlhf.files import read_json
from rlhf.finished.chat import cli as chat
from rlhf.finished.compare import cli as compare
from rlhf.finished.export import cli as export
from rlhf.pipeline.numerics import settle_numerics
from tests.helpers.command_line import TINY
from tests.helpers.composed_config import composed_plan
from tests.helpers.finished_runs import finished_outputs
from tests.helpers.run_results import assert_identical, collect_run_results


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    settle_numerics()


def unsettle() -> None:
    """What torch does by default."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)


def test_attention_has_every_back_end_but_cudnn() -> None:
    unsettle()
    settle_numerics()
    cuda = torch.backends.cuda
    assert (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()) == (True, True, True)
    assert not cuda.cudnn_sdp_enabled()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(("chosen", "on", "warns"), [(True, True, False), ("warn", True, True), (None, False, False)])
def test_determinism_is_switched_on_and_off_again(
    chosen: Any, on: bool, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    settle_numerics(chosen)
    assert torch.are_deterministic_algorithms_enabled() == on
    assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == str(int(on))
    settle_numerics(False)
    assert not torch.are_deterministic_algorithms_enabled()


# -- commands --------------------------------------------------------------------------------------------------------


@contextmanager
def computing_modules() -> Iterator[set[str]]:
    """The classes of modules that compute meanwhile; each must find the kernels chosen."""
    seen: set[str] = set()

    def look(module: nn.Module, *_: Any) -> None:
        assert not torch.backends.cuda.cudnn_sdp_enabled(), type(module)
        assert torch.get_float32_matmul_precision() == "high", type(module)
        seen.add(type(module).__name__)

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def reaches_models(module: str) -> bool:
    """Whether a module imports ours for models, directly or not, at its top or inside functions; not for types only."""
    todo, found = [module], set()
    while todo:
        name = todo.pop()
        place = root().joinpath(*name.split("."))
        file = next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
        if file is None or name in found:
            continue
        found.add(name)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        unused = {part for block in typing for part in ast.walk(block)}
        for node in set(ast.walk(tree)) - unused:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf"):
                todo += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return any(name.startswith("rlhf.models.") for name in found)


def test_every_command_that_makes_models_is_run_below() -> None:
    if not (root() / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    scripts = tomllib.loads((root() / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    reaching = {name for name, target in scripts.items() if reaches_models(target.partition(":")[0])}
    assert reaching == {"rlhf", "rlhf-chat", "rlhf-export", "rlhf-compare", "rlhf-agreement"}


def test_rlhf_chooses_the_kernels_first_and_determinism_changes_no_bit_on_a_cpu(
    command: Callable, tmp_path: Path
) -> None:
    found: list[list] = []
    cached: list[set[str]] = []
    for name, value in (("default", "false"), ("deterministic", "true")):
        unsettle()
        with computing_modules() as seen:
            code, _, error = command(*TINY, "trainer=cpu", f"trainer.deterministic={value}", f"output_dir={name}")
        assert code == 0, error
        assert any("Attention" in kind for kind in seen)
        summaries = sorted((tmp_path / name).glob("*/*/summary.json"))
        assert len(summaries) == 3  # SFT model, reward model, PPO
        assert {read_json(path)["deterministic"] for path in summaries} == {value == "true"}
        found.append([*collect_run_results(path.parent for path in summaries).values()])
        cached.append({path.name for path in (tmp_path / name / "cache").glob("*-*") if path.is_dir()})
    assert_identical(*found)
    assert cached[0] == cached[1]  # their names contain their identities
    # so does a comparison of what was trained
    (policy,) = (path.parent for path in (tmp_path / "default").glob("*/*/summary.json") if path.parts[-3] != "cache")
    unsettle()
    with computing_modules() as seen:
        compare.main([str(policy), f"{policy}@sft", "evaluation.prompts=2"])
    assert any("Attention" in kind for kind in seen)


def test_determinism_changes_no_identity(tmp_path: Path) -> None:
    plans = [composed_plan(tmp_path, f"trainer.deterministic={value}") for value in ("false", "true")]
    assert len({plan.identity for plan in plans}) == 1
    assert len({tuple(path.name for path in plan.needed().values()) for plan in plans}) == 1


def test_chat_chooses_the_kernels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = finished_outputs(tmp_path / "outputs")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "lines").open("w+"))
    sys.stdin.write("w9 w7\n")
    sys.stdin.seek(0)
    unsettle()
    with computing_modules() as seen:
        chat.main([str(runs.ppo)])
    assert any("Attention" in kind for kind in seen)


def test_an_export_computes_nothing(tmp_path: Path) -> None:
    runs = finished_outputs(tmp_path / "outputs")
    unsettle()
    with computing_modules() as seen:
        export.main([str(runs.ppo), str(tmp_path / "model")])
    assert not seen
