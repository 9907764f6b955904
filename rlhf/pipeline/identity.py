"""What decides a result: the keys, files and code of which a digest names an SFT model, a reward model or a run.

Two runs of one identity are the same run, so whatever changes a result must change the identity, and nothing else may.
"""

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf import PACKAGE
from rlhf.data.records import Split
from rlhf.evaluation.client_settings import endpoint_identity
from rlhf.files.digests import content_digest

LIGHTNING = ("lightning.Trainer", "lightning.pytorch.Trainer", "pytorch_lightning.Trainer")
# The keys of Lightning's trainer that change how a result is reached, and not the result.
HARMLESS = frozenset({
    "_target_", "accelerator", "devices", "num_nodes", "strategy", "deterministic", "benchmark", "profiler",
    "detect_anomaly", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "default_root_dir",
})  # fmt: skip
# Labels, and how often a stage saves or logs.
UNDECIDING = frozenset({"name", "checkpoint_every", "log_every"})
# A single word under one of these keys may name a folder; anywhere else it is a choice such as `engine=native`.
PATHS = frozenset({"root", "folder", "name_or_path", "tokenizer", "model"})
CODE = frozenset({"_target_", "function"})  # keys that name a class or function
# What watches a run or tells of it, and what only names paths and errors, does not decide it.
WATCHING = ("rlhf.errors", "rlhf.files", "rlhf.tracking", "rlhf.report", "rlhf.sweep", "rlhf.pipeline.cache",
            "rlhf.pipeline.checkpoints", "rlhf.pipeline.identity", "rlhf.pipeline.interruption")  # fmt: skip


def digest(determinants: Mapping[str, Any], code: Iterable[bytes] = (), known: Path | None = None) -> str:
    """Twelve hex digits of configuration keys, the local files that they name, and source code.

    A file counts by its content, wherever it lies. `known` is where digests of files are kept, so that a large one is
    read once (`content_digest`).
    """
    source = hashlib.sha256(b"".join(code))
    content = {"config": by_content(dict(determinants), known), "code": source.hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def by_content(node: Any, known: Path | None = None, root: str = "", key: str = "") -> Any:
    """The configuration with a digest in the place of every local file or folder that it names.

    A mapping with a `root` names files below it; a slice of rows behind a file's name stays. A class or function of the
    user's own counts by the file that it is in.
    """
    if isinstance(node, Mapping):
        root = str(node.get("root") or root)
        return {name: by_content(value, known, root, name) for name, value in node.items() if not _is_root(name, value)}
    if isinstance(node, list | tuple):
        return [by_content(value, known, root, key) for value in node]
    if not isinstance(node, str):
        return node
    if key in CODE:
        file = _users_file(node)
        return f"{node} of {content_digest(file, known)}" if file else node
    name, bracket, rows = node.partition("[")
    path = Path(root, name).expanduser() if _may_be_a_path(node, key, root) else None
    if path is None or not path.exists():
        return node
    return "".join((content_digest(path, known), _kind(path), bracket, rows))


def _is_root(key: str, value: Any) -> bool:
    """A local `root` is where files lie, which count by themselves."""
    return key == "root" and isinstance(value, str) and Path(value).expanduser().is_dir()


def _may_be_a_path(text: str, key: str, root: str) -> bool:
    return 0 < len(text) < 1024 and "\n" not in text and (bool(root) or key in PATHS or bool(re.search(r"[/.~]", text)))


def _kind(path: Path) -> str:
    """The endings by which readers know a file's format; a folder has none."""
    if path.is_dir():
        return ""
    return "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:]).lower()


def _users_file(target: str) -> Path | None:
    """The file of a class or function outside of installed packages and of ours."""
    module = target
    while (module := module.rpartition(".")[0]) and module.partition(".")[0] != "rlhf":
        with suppress(ImportError, ValueError, AttributeError):
            found = find_spec(module)
            if found is not None:
                file = Path(found.origin or "")
                return file if file.is_file() and not {"site-packages", "dist-packages"} & set(file.parts) else None
    return None


def of_data(data: Mapping[str, Any], source: Any, splits: Collection[Split]) -> dict[str, Any]:
    """The keys of `data` that decide the rows of some splits (`DataSource.concerns`, where the class has it)."""
    concerns: Mapping[str, Collection[Split]] = getattr(source, "concerns", {})
    return {
        key: value for key, value in data.items() if key not in concerns or not set(splits).isdisjoint(concerns[key])
    }


def of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What of `trainer` decides: nothing of Lightning's own, whose other keys are refused (`rlhf.pipeline.config`)."""
    kept = {key: value for key, value in trainer.items() if key not in HARMLESS}
    return kept if trainer["_target_"] in LIGHTNING else {**kept, "_target_": trainer["_target_"]}


def decisive(node: Any) -> Any:
    """A part of the configuration without labels and how often something is saved or logged.

    Of the client of a judge it is who answers, and not how he is reached.
    """
    if not isinstance(node, Mapping):
        return node
    return {
        key: endpoint_identity(value) if key == "client" and isinstance(value, Mapping) else decisive(value)
        for key, value in node.items()
        if key not in UNDECIDING
    }


def source_of(modules: Iterable[str], functions: Iterable[Callable[..., Any]]) -> list[bytes]:
    """The source code of modules, with what they import (`code_of`), and of functions by themselves."""
    parts = [file.read_bytes() for file in code_of(*modules)]
    return parts + [inspect.getsource(function).encode() for function in functions]


def code_of(*modules: str) -> list[Path]:
    """The files of these modules and of all of ours that they import, however deep, but those of `WATCHING`."""
    found: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        module = todo.pop()
        file = _file_of(module)
        if (
            file is None
            or module in found
            or module == "rlhf"
            or f"{module}.".startswith(tuple(f"{name}." for name in WATCHING))
        ):
            continue
        found[module] = file
        todo += _imports(file)
    return sorted(found.values())


def _file_of(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _imports(file: Path) -> Iterator[str]:
    """What a file imports, at its top or inside of functions: modules, and names that may be modules."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("rlhf"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "rlhf":
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
