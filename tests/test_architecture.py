"""Imports go one way: data → models → rollout → evaluation → stages → pipeline → report. Other rules for the source."""

import ast
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rlhf
from rlhf import root

PACKAGE = Path(__import__("rlhf").__file__).parent
# Folders and single files, from the bottom up. A module may import from lower floors and from its own floor, as long as
# there is no circle.
FLOORS = [
    ["errors", "__init__"],
    ["settings", "policy_settings", "schema", "seeding", "files", "reference"],
    [
        "distributed",
        "objectives",
        "divergence",
        "f_divergence",
        "placement",
        "restoring_pull",
        "ppo",
        "advantages",
        "aggregation",
        "preference_losses",
    ],
    ["tracking", "guards"],
    ["data"],
    ["models"],
    ["rollout"],
    ["scorers"],
    ["evaluation"],
    ["stages"],
    ["pipeline"],
    ["report"],
    ["sweep"],
    ["finished"],
    ["cli"],
    ["notebooks"],
    ["worker", "__main__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(["rlhf", *file.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside functions."""
    known, found = {module_of(other) for other in FILES}, set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{name.name}" for name in node.names} & known
            named = all(f"{node.module}.{name.name}" in known for name in node.names)
            found |= inside if named else {*inside, node.module}
    return (found & known) - {module_of(file), "rlhf"}


def floor_of(module: str) -> int:
    return FLOOR[module.split(".")[1]]


def test_every_folder_has_a_floor() -> None:
    inside = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert inside == set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_imports_from_a_higher_floor(file: Path) -> None:
    own = module_of(file)
    if own != "rlhf":
        assert not {module for module in imports(file) if floor_of(module) > floor_of(own)}


def test_git_ignores_no_module() -> None:
    """A pattern such as `build/` would leave a folder of that name out of every clone and wheel."""
    files = "\n".join(str(file) for file in FILES)
    done = subprocess.run(["git", "check-ignore", "--stdin"], input=files, cwd=root(), capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip("not a checkout")
    assert not done.stdout


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module_of(file): imports(file) for file in FILES}).prepare()


@pytest.mark.parametrize("folder", ["tracking", "report", "sweep"])
def test_stages_do_not_import_from(folder: str) -> None:
    assert not {
        module
        for file in (PACKAGE / "stages").glob("*.py")
        for module in imports(file)
        if module.startswith(f"rlhf.{folder}.")
    }


def test_test_modules_share_code_only_through_the_helpers() -> None:
    tests = Path(__file__).parent
    found = {}
    for file in tests.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{'.' * node.level}{node.module}.{name.name}" for name in node.names}
        found[str(file.relative_to(tests))] = {
            name for name in names if name.startswith((".", "tests.")) and not name.startswith("tests.helpers.")
        }
    # `from tests.helpers import x` is listed as `tests.helpers.x`
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize("folder", ["rlhf", "tests", "hydra_plugins", "benchmarks"])
def test_files_fit_a_reading_and_functions_a_screen(folder: str) -> None:
    files = list((PACKAGE.parent / folder).rglob("*.py"))
    assert not [file for file in files if len(file.read_text().splitlines()) > 300]
    if folder == "tests":  # a test may tell a long story
        return
    functions = [node for file in files for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 50]  # type: ignore[operator]


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


def test_every_text_file_is_opened_with_its_encoding() -> None:
    for path in sorted((root() / "rlhf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and opens_text(node):
                assert any(word.arg == "encoding" for word in node.keywords), f"{path}:{node.lineno}"


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text, which uses the locale's encoding by default."""
    called = call.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
    if name in ("read_text", "write_text"):
        return len(call.args) == (name == "write_text")
    if name != "open" or owner in ("gzip", "os", "cls", "FinishedRun"):
        return False
    mode = call.args[0 if owner else 1 :][:1]
    return not (mode and "b" in ast.unparse(mode[0]))


def test_the_base_install_needs_none_of_the_extra() -> None:
    for file in Path(rlhf.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"openai", "diskcache", "bm25s", "pysbd"}, file
