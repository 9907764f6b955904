"""The pages name real code: docs/tour.md, the README's tree, and the sources of docs/metrics.md."""

import ast
import re
from pathlib import Path

import pytest

from rlhf import PACKAGE, root
from tests.test_architecture import FLOOR

TOUR = (root() / "docs" / "tour.md").read_text()
README = (root() / "README.md").read_text()
METRICS = (root() / "docs" / "metrics.md").read_text()
FOLDERS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


def names_in(file: Path) -> set[str]:
    """Functions, classes, methods (`Class.method`) and constants that a module defines."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def wrong_names(page: str) -> list[str]:
    """Paths that do not exist, and names that the file before them in the same paragraph or item does not define.

    Anything in backticks is a path, a name, or code with a space or an equals sign in it.
    """
    wrong: list[str] = []
    for item in re.split(r"\n(?=\d+\. |- |#|\n)", page):
        known: set[str] | None = None
        for text in re.findall(r"`([^`]+)`", item):
            path = root() / text
            if "/" in text:
                wrong += [] if path.exists() else [text]
                known = names_in(path) if path.suffix == ".py" and path.exists() else known
            elif not re.search(r"[ =]", text) and text != "rlhf" and known is not None:
                wrong += [] if text in known or text in RECORDED else [text]
    return wrong


# names that a walk mentions before the stop that explains them
RECORDED = {"Run", "preference"}


def section(page: str, heading: str) -> str:
    (found,) = re.findall(rf"^## {heading}.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def test_the_tour_names_real_files_and_functions() -> None:
    assert wrong_names(TOUR) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("PPO.training_step", "PPO.train_a_batch"),
        ("RewardModeling.margins", "RewardModeling.differences"),
        ("`gae`", "`advantages`"),
        ("rlhf/stages/reward.py", "rlhf/stages/reward_model.py"),
    ],
)
def test_a_renamed_function_or_file_is_noticed(old: str, new: str) -> None:
    assert old in TOUR
    assert wrong_names(TOUR.replace(old, new))


def test_a_prompt_passes_at_most_four_files() -> None:
    files = re.findall(r"`(rlhf/\S+\.py)`", section(TOUR, "The way of a prompt"))
    assert 1 <= len(set(files)) <= 4


def test_the_tour_lists_every_folder_in_the_order_of_the_flow() -> None:
    listed = re.findall(r"^- `rlhf/(\w+)/`", section(TOUR, "The folders"), re.MULTILINE)
    assert sorted(listed) == sorted(FOLDERS)
    assert [FLOOR[name] for name in listed] == sorted(FLOOR[name] for name in listed)


def test_the_readme_has_todays_tree() -> None:
    tree = section(README, "The tree")
    top = {path.name for path in root().iterdir() if path.is_dir() and not path.name.startswith(("_", ".", "outputs"))}
    for name in top & {"benchmarks", "conf", "docs", "experiments", "hydra_plugins", "rlhf", "sweeps", "tests"}:
        assert f"\n{name}/" in tree
    assert set(re.findall(r"^  (\w+)/", tree, re.MULTILINE)) == FOLDERS
    files = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"\b(\w+\.py)\b", tree)) == files


def test_metrics_name_real_sources() -> None:
    sources = [row.rpartition("|")[0].rpartition("|")[2] for row in re.findall(r"^\| `\w+/\w+` \|.*$", METRICS, re.MULTILINE)]
    defined = {"rlhf.divergence"}
    for file in PACKAGE.rglob("*.py"):
        defined.add(str(file.relative_to(PACKAGE)))
        for name in names_in(file):
            defined |= {name, f"{file.stem}.{name}", f"{file.parent.name}.{file.stem}.{name}"}
    named = {name for source in sources for name in re.findall(r"`([^`]+)`", source)}
    assert named
    assert named - defined == set()
