"""The one-way flow: data → models → stages → evaluation → pipeline; nothing imports what stands after it."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlhf import root

PACKAGE = Path(__import__("rlhf").__file__).parent
ORDER = [
    "failures", "files", "checksums", "allocation", "locks", "code", "dashboards", "resolvers", "settings",
    "explaining", "objectives", "slurm", "parallel", "sweep", "guards", "divergence", "ppo", "data", "models",
    "rollout", "vllm_engine", "scorers", "stages", "evaluation", "checkpoints", "capabilities", "config", "tracking",
    "cache", "interruption", "training", "building", "pipeline", "preview", "report", "search", "cli", "worker",
    "finished", "publish", "chat", "finished_judge",
]  # fmt: skip


def imports(file: Path) -> set[str]:
    """First names below `rlhf` that a module imports when it is loaded."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "rlhf":
            rest = node.module.split(".")[1:]
            names |= {rest[0]} if rest else {alias.name for alias in node.names}
    return names & set(ORDER)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_imports_what_stands_after_it(file: Path) -> None:
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    later = {name for name in imports(file) if ORDER.index(name) > ORDER.index(own)}
    assert not later


def test_the_command_line_does_not_wait_for_torch() -> None:
    code = "import sys, rlhf.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_wheel_carries_the_configuration(tmp_path: Path) -> None:
    if not (root() / "pyproject.toml").exists():
        pytest.skip("not a checkout")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(root())]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for folder in ("conf", "experiments", "sweeps"):
        files = [path for path in (root() / folder).rglob("*") if path.suffix in (".yaml", ".txt")]
        inside = {str(path.relative_to(root())) for path in files}
        assert inside
        assert {f"rlhf/_root/{name}" for name in inside} <= set(names)
    assert "rlhf/py.typed" in names
