"""What decides a result: the keys, files and code whose digest identifies an SFT model, a reward model or a run.

Two runs with equal identities are the same run. So whatever changes a result must change the identity, and nothing else
should. What decides a policy (`of_training`) and what only measures it (`of_evaluation`) are two identities: another
judge makes another evaluation of the same run.
"""

import ast
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf import PACKAGE
from rlhf.data.records import SPLITS, Split
from rlhf.evaluation.client_settings import endpoint_identity
from rlhf.files.digests import content_digest
from rlhf.policy_settings import FROM_COMPARISONS, METHODS

LIGHTNING = ("lightning.Trainer", "lightning.pytorch.Trainer", "pytorch_lightning.Trainer")
# Keys of Lightning's trainer that change how a result is reached, but not the result.
IGNORED_TRAINER_KEYS = frozenset({
    "_target_", "accelerator", "devices", "num_nodes", "strategy", "deterministic", "benchmark", "profiler",
    "detect_anomaly", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "default_root_dir",
})  # fmt: skip
# Labels, intervals of saving and logging, and CUDA graphs, which only make decoding faster: on a GPU the metrics were
# equal with and without them, and elsewhere the key has no effect.
IGNORED_KEYS = frozenset({"name", "checkpoint_every", "log_every", "cuda_graphs"})
# Keys that only measure a policy: with other values the same steps are trained. `keep_best` is none of them: which
# policy is left as the best one cannot be chosen again once the run has ended.
MEASURING = frozenset({"judge", "evaluation", "policy"}) | {
    f"{method}.{key}" for method in METHODS for key in ("eval_every", "keep_evaluated")
}
# Values at which a key does nothing: the run is the same as one of a version that did not have the key.
OFF: Mapping[str, Any] = {
    "advantages": {"name": "gae", "function": "rlhf.advantages.gae", "baseline": "value", "options": {}},
    "generation.samples_per_prompt": 1, "ppo.clip_range_high": None, "ppo.dual_clip": None, "ppo.ratio": "token",
    "ppo.loss_aggregation": "token_mean", "kl.placement": "auto", "kl.importance_weight": False,
    "ppo.score_transform": "none", "ppo.reference_answers": 1, "reward.margin_coef": 0, "reward.length_coef": 0,
    "reward.center_coef": 0, "reward.average_of": 1, "sft.max_grad_norm": 1.0, "reward.max_grad_norm": 1.0,
    "data.keep": None, "data.annotations": 1, "data.edit_annotations": 1, "loss_terms": {}, "ppo.entropy_coef": 0,
    "ppo.ptx_coef": 0, "ppo.ptx_batch_size": None, "ppo.ptx_texts": None, "evaluation.demonstrations": 100,
    "evaluation.texts": None, "evaluation.diversity_samples": 0,
    "reference": {"_target_": "rlhf.stages.reference.Fixed"},
    **{
        f"{adapter}.{key}": value
        for adapter in ("lora", "sft.lora", "reward.lora")
        for key, value in {"layers_to_transform": None, "rslora": False, "dora": False, "lr_ratio": 1.0,
                           "init": "default", "modules_to_save": None}.items()
    },
}  # fmt: skip
EXTENT = frozenset({"samples", "steps"})  # of `evaluation`: how much is measured and shown, not what a number means
# A single word under one of these keys may name a folder; anywhere else it is a choice such as `engine=native`.
PATHS = frozenset({"root", "folder", "name_or_path", "tokenizer", "model", "chat_template"})
CODE = frozenset({"_target_", "function"})  # keys that name a class or function
# Code that observes, stores, names or reports a run, or only creates what the keys name, does not decide its result.
WATCHING = (
    "rlhf.errors", "rlhf.files", "rlhf.tracking", "rlhf.report", "rlhf.sweep", "rlhf.pipeline.cache",
    "rlhf.pipeline.checkpoints", "rlhf.pipeline.config", "rlhf.pipeline.identity", "rlhf.pipeline.interruption",
    "rlhf.pipeline.rendered",
)  # fmt: skip


def digest(determinants: Mapping[str, Any], code: Iterable[Path] = (), known: Path | None = None) -> str:
    """Twelve hex digits of configuration keys, the local files that they name, and files of source code.

    A file counts by its content, not by its place. `known` is a folder of digests of files, so that a large file is
    read only once (`content_digest`).
    """
    source = hashlib.sha256(b"".join(file.read_bytes() for file in code))
    content = {"config": by_content(dict(determinants), known), "code": source.hexdigest()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def by_content(node: Any, known: Path | None = None, root: str = "", key: str = "") -> Any:
    """The configuration, with every local file or folder that it names replaced by a digest.

    A mapping with a `root` names files below that root, except in a prompt template, which is no data. A slice of rows
    behind a file's name is kept. A class or function of the user's own is replaced by the digest of its file.
    """
    if isinstance(node, Mapping):
        root = "" if key == "template" else str(node.get("root") or root)
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


def contents(config: Mapping[str, Any], known: Path | None = None) -> dict[str, Any]:
    """Dotted key → digest of what it names, for the keys of a configuration that name files or code of the user's own.

    A list with such names counts as one value, and the files below a `root` by the keys that name them.
    """
    named, found = dict(_leaves(config)), dict(_leaves(by_content(config, known)))
    return {key: value for key, value in found.items() if value != named[key]}


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_root(key: str, value: Any) -> bool:
    """Whether this is a local `root` folder; it is left out, because the files below it count by their content."""
    return key == "root" and isinstance(value, str) and Path(value).expanduser().is_dir()


def _may_be_a_path(text: str, key: str, root: str) -> bool:
    return 0 < len(text) < 1024 and "\n" not in text and (bool(root) or key in PATHS or bool(re.search(r"[/.~]", text)))


def _kind(path: Path) -> str:
    """The suffixes by which readers recognise a file's format; empty for a folder."""
    if path.is_dir():
        return ""
    return "".join(path.suffixes[-2:] if path.suffix.lower() in (".gz", ".zst") else path.suffixes[-1:]).lower()


def _users_file(target: str) -> Path | None:
    """The file of a class or function of the user's own, outside installed packages and this one; else None."""
    module = target
    while (module := module.rpartition(".")[0]) and module.partition(".")[0] != "rlhf":
        with suppress(ImportError, ValueError, AttributeError):
            found = find_spec(module)
            if found is not None:
                file = Path(found.origin or "")
                return file if file.is_file() and not {"site-packages", "dist-packages"} & set(file.parts) else None
    return None


def of_data(data: Mapping[str, Any], source: Any, splits: Collection[Split]) -> dict[str, Any]:
    """The keys of `data` that decide the rows of these splits (see `DataSource.concerns`)."""
    concerns: Mapping[str, Collection[Split]] = getattr(source, "concerns", {})
    return {
        key: value
        for key, value in data.items()
        if (key not in concerns or not set(splits).isdisjoint(concerns[key])) and not _is_off(f"data.{key}", value)
    }


def idle(stage: str) -> set[str]:
    """The config groups that decide nothing in a stage: those of other methods, and what only PPO reads."""
    method = stage if stage in METHODS else "ppo"
    of_ppo = ("kl", "divergence", "reference", "advantages", "loss_terms")
    return {*METHODS, *(() if method == "ppo" else of_ppo)} - {method}


def of_training(config: Mapping[str, Any], source: Any, stage: str = "ppo") -> dict[str, Any]:
    """The keys that decide what is trained: all but `MEASURING`, and of `data` those of more than the split `eval`.

    Where the policy learns from comparisons, scorer and reward model only measure it, too. With `patience` the
    evaluations decide when the training ends, so that all keys count.
    """
    method = stage if stage in METHODS else "ppo"
    if config[method].get("patience"):
        return dict(config)
    only_measuring = MEASURING | {"scorer", "reward"} if method in FROM_COMPARISONS else MEASURING
    kept = {key: value for key, value in config.items() if key not in only_measuring}
    return {
        **kept,
        method: {key: value for key, value in config[method].items() if f"{method}.{key}" not in MEASURING},
        "data": of_data(config["data"], source, [split for split in SPLITS if split != "eval"]),
    }


def of_evaluation(config: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """The keys that decide what the numbers of an evaluation mean: its instructions, decoding and judge."""
    return {
        "judge": config["judge"],
        "evaluation": {key: value for key, value in config["evaluation"].items() if key not in EXTENT},
        "data": of_data(config["data"], source, ["eval"]),
    }


def measured_as(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the keys `MEASURING` of another configuration, by which the results beside it were measured."""
    found = {key: value for key, value in config.items() if key not in MEASURING}
    found |= {key: value for key, value in other.items() if key in MEASURING}
    for method in (name for name in METHODS if name in config):
        own = {key: value for key, value in other.get(method, {}).items() if f"{method}.{key}" in MEASURING}
        found[method] = {**config[method], **own}
    return found


def of_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `trainer` that decide: none of Lightning's own trainer (`rlhf.pipeline.checks` refuses those)."""
    kept = {key: value for key, value in trainer.items() if key not in IGNORED_TRAINER_KEYS}
    return kept if trainer["_target_"] in LIGHTNING else {**kept, "_target_": trainer["_target_"]}


def decisive(node: Any, path: str = "") -> Any:
    """A part of the configuration, which lies below the dotted `path`, without `IGNORED_KEYS` and what is `OFF`.

    Of a judge's client only the model that answers is kept, not how it is reached. In `data` a name is no label: it may
    choose a part of a data set.
    """
    if not isinstance(node, Mapping):
        return node
    return {
        key: value if key == "data" else endpoint_identity(value) if key == "client" and isinstance(value, Mapping)
        else decisive(value, f"{path}{key}.")
        for key, value in node.items()
        if key not in IGNORED_KEYS and not _is_off(f"{path}{key}", value)
    }  # fmt: skip


def _is_off(key: str, value: Any) -> bool:
    return key in OFF and value == OFF[key]


def code_of(*modules: str) -> list[Path]:
    """The files of these modules and of everything of ours that they import, directly or not, except `WATCHING`.

    A module of the user's own counts by its file elsewhere (`by_content`).
    """
    found: dict[str, Path] = {}
    todo, watching = list(modules), tuple(f"{name}." for name in WATCHING)
    while todo:
        module = todo.pop()
        file = _file_of(module)
        if file is None or module in found or module == "rlhf" or f"{module}.".startswith(watching):
            continue
        found[module] = file
        todo += _imports(file, file.stat().st_mtime_ns)
    return sorted(found.values())


def _file_of(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def _imports(file: Path, changed: int) -> list[str]:
    """What a file imports, at its top or inside functions: modules, and names that may be modules.

    Each job of a dry run asks again; `changed`, the time of its last change, is there for the cache.
    """
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += (name.name for name in node.names if name.name.startswith("rlhf"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "rlhf":
            found += (node.module, *(f"{node.module}.{name.name}" for name in node.names))
    return found
