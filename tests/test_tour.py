"""The pages name real code: docs/tour.md in particular, the site's menu, and the sources of docs/metrics.md."""

import ast
import re
from pathlib import Path

import pytest

from rlhf import PACKAGE, root

TOUR = (root() / "docs" / "tour.md").read_text()
README = (root() / "README.md").read_text()
METRICS = (root() / "docs" / "metrics.md").read_text()
PAGES = [
    root() / "README.md",
    root() / "experiments" / "README.md",
    root() / "benchmarks" / "RESULTS.md",
    *sorted((root() / "docs").glob("*.md")),
    *sorted((root() / "experiments" / "results").glob("*.md")),
]
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


NAMES = {file: names_in(file) for file in PACKAGE.rglob("*.py")}
CLASSES = {name for names in NAMES.values() for name in names if name[0].isupper() and "." not in name}


def wrong_names(page: str) -> list[str]:
    """Paths that do not exist, and names that the file before them in the same paragraph or item does not define.

    Anything in backticks is a path, a config key, a name, or code with a space or an equals sign in it.
    """
    wrong: list[str] = []
    for item in re.split(r"\n(?=\d+\. |- |#|\n)", page):
        known: set[str] | None = None
        for text in re.findall(r"`([^`]+)`", item):
            path = root() / text
            if "/" in text:
                wrong += [] if path.exists() else [text]
                known = NAMES.get(path, known)
            elif re.fullmatch(r"[a-z]+\.[a-z_]+", text):
                wrong += [] if is_key(text) else [text]
            elif not re.search(r"[ =]", text) and known is not None:
                wrong += [] if text in known else [text]
    return wrong


def is_key(text: str) -> bool:
    group, _, key = text.partition(".")
    file = root() / "conf" / group / "default.yaml"
    return file.exists() and bool(re.search(rf"^{key}:", file.read_text(), re.MULTILINE))


def section(page: str, heading: str) -> str:
    (found,) = re.findall(rf"^## {heading}.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


# -- the tour ----------------------------------------------------------------------------------------------------------


def test_the_tour_names_real_files_and_functions() -> None:
    assert wrong_names(TOUR) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("PPO.training_step", "PPO.train_a_batch"),
        ("RewardModeling.scores", "RewardModeling.differences"),
        ("`gae`", "`advantages`"),
        ("`ppo.clip_range`", "`ppo.clip`"),
        ("rlhf/stages/reward.py", "rlhf/stages/reward_model.py"),
    ],
)
def test_a_renamed_function_or_file_is_noticed(old: str, new: str) -> None:
    assert old in TOUR
    assert wrong_names(TOUR.replace(old, new))


def test_a_prompt_passes_at_most_four_files() -> None:
    files = re.findall(r"`(rlhf/\S+\.py)`", section(TOUR, "The path of a prompt"))
    assert 1 <= len(set(files)) <= 4


def imported_folders(folder: str) -> set[str]:
    """The other folders of the package that the modules of a folder import, at their top or inside of functions."""
    found = set()
    for file in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf"):
                found |= {f"{node.module}.{name.name}.".split(".")[1] for name in node.names}
    return found & FOLDERS - {folder}


def check_order(listed: list[str]) -> None:
    """Every folder is listed once, and none imports a folder that is listed after it."""
    assert sorted(listed) == sorted(FOLDERS)
    for i, name in enumerate(listed):
        assert imported_folders(name) <= set(listed[:i]), name


def test_the_tour_lists_every_folder_in_the_order_of_the_flow() -> None:
    check_order(re.findall(r"^- `rlhf/(\w+)/`", section(TOUR, "The folders"), re.MULTILINE))


# -- other pages -------------------------------------------------------------------------------------------------------


def test_the_tour_lists_every_single_file() -> None:
    files = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    listed = re.findall(r"`rlhf/(\w+\.py)`", section(TOUR, "The folders").partition("Single files:")[2])
    assert set(listed) == files
    assert len(listed) == len(files)


def test_the_site_has_every_page() -> None:
    """A page that is in no menu is found by nobody; those that are made when the site is built have no file here."""
    listed = re.findall(r": ([\w/]+\.md)$", (root() / "mkdocs.yml").read_text(), re.MULTILINE)
    made = {"index.md", "results/index.md", "speed.md", "configuration.md", "notebook.md"}
    made |= {f"results/{page.name}" for page in (root() / "experiments" / "results").glob("*.md")}
    assert sorted(listed) == sorted(made | {page.name for page in (root() / "docs").glob("*.md")})


def test_the_readme_names_every_folder() -> None:
    for name in ("benchmarks", "conf", "docs", "experiments", "hydra_plugins", "rlhf", "sweeps", "tests"):
        assert (root() / name).is_dir()
        assert f"`{name}/`" in section(README, "Where things are")


def test_metrics_name_real_sources() -> None:
    rows = re.findall(r"^\| `\w+/\w+` \|.*$", METRICS, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[-1])}
    defined = {"rlhf.divergence"}
    for file, names in NAMES.items():
        defined.add(str(file.relative_to(PACKAGE)))
        for name in names:
            defined |= {name, f"{file.stem}.{name}", f"{file.parent.name}.{file.stem}.{name}"}
    assert len(named) > 20
    assert named - defined == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(root())))
def test_a_page_names_real_files_modules_and_methods(page: Path) -> None:
    """Paths from the root, `rlhf.module.name`, and `Class.method` of the package's classes; `mine` is the reader's."""
    text = page.read_text()
    folders = "rlhf|tests|conf|docs|experiments|benchmarks|sweeps|hydra_plugins"
    paths = re.findall(rf"(?<![\w/.])((?:{folders})/[\w/-]+\.(?:py|md|yaml|jsonl|txt))\b", text)
    paths += [str((page.parent / link).resolve()) for link in re.findall(r"\]\(([\w./]+\.md)(?:#[\w-]+)?\)", text)]
    assert [path for path in paths if "mine" not in path and not (root() / path).exists()] == []
    modules = {".".join(("rlhf", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in NAMES}
    dotted = {*modules, *(name.removesuffix(".__init__") for name in modules)}
    dotted |= {f"{module.removesuffix('.__init__')}.{name}" for module, file in modules.items() for name in NAMES[file]}
    assert [name for name in re.findall(r"`(rlhf(?:\.\w+)+)`", text) if name not in dotted] == []
    methods = re.findall(r"`([A-Z]\w+)\.(\w+)`", text)
    known = set().union(*NAMES.values())
    assert [f"{name}.{part}" for name, part in methods if name in CLASSES and f"{name}.{part}" not in known] == []
