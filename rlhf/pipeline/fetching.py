"""What a run would fetch from the Hub: checkpoints, tokenizers and data sets, found in its configuration."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants, try_to_load_from_cache

from rlhf.data.sources import Source
from rlhf.errors import DataError

# The keys that name a checkpoint or a tokenizer by a Hub id or a folder.
CHECKPOINTS = (
    "model.name_or_path", "model.tokenizer", "sft.from", "sft.difference_to", "reward.from", "reward.difference_to",
    "scorer.model", "evaluation.gold.model",
)  # fmt: skip
HUB_ID = re.compile(r"([\w-][\w.-]*(?:/[\w.-]+)?)(?:@[\w./-]+)?")  # an owner may be missing, as in `gpt2`
NOT_SOURCES = frozenset({"template", "root", "on_bad_row", "shares", "max_rows"})


def hub_models(plain: Mapping[str, Any]) -> dict[str, str]:
    """The Hub ids of checkpoints and tokenizers by the key that names each; what is a folder here is none."""
    found = {key: _select(plain, key) for key in CHECKPOINTS}
    return {
        key: name
        for key, name in found.items()
        if isinstance(name, str) and HUB_ID.fullmatch(name) and not Path(name).expanduser().exists()
    }


def repository(name: str) -> str:
    """`owner/name` of a Hub id with a revision, a configuration or a split behind it."""
    return "/".join(re.split(r"[@:\[]", name.removeprefix("hf://datasets/"))[0].split("/")[:2])


def held(name: str, kind: str = "model") -> bool:
    """Whether a model or a data set (`kind="dataset"`) of the Hub is in the local cache, in any revision."""
    if kind == "model" and any(
        isinstance(try_to_load_from_cache(repository(name), file), str)
        for file in ("config.json", "adapter_config.json")
    ):
        return True
    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository(name).replace('/', '--')}" / "snapshots"
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / repository(name).replace("/", "___")
    places = (snapshots, prepared) if kind == "dataset" else (snapshots,)
    return any(place.is_dir() and any(place.iterdir()) for place in places)


def checkpoints(plain: Mapping[str, Any]) -> dict[str, str]:
    """The Hub ids of checkpoints by the key that names each, and whether it is in the local cache."""
    return {
        key: f"{name}, {'in the local cache' if held(name) else 'to be fetched'}"
        for key, name in hub_models(plain).items()
    }


def data_sets(data: Mapping[str, Any]) -> list[str]:
    """The data sets on the Hub that `data` names."""
    return sorted(set(_remote({key: value for key, value in data.items() if key not in NOT_SOURCES}, data.get("root"))))


def _remote(node: Any, root: Any) -> Iterator[str]:
    if isinstance(node, list):
        for part in node:
            yield from _remote(part, root)
    elif isinstance(node, Mapping) and not isinstance(node.get("path"), str):
        for key, part in node.items():
            yield from _remote(part, root) if not str(key).startswith("_") else ()
    elif isinstance(node, Mapping | str):
        try:
            source = Source.parse(node, Path(str(root or ".")).expanduser())
        except DataError:
            return
        if source.hub and not Path(str(source.hub["path"])).expanduser().exists():
            yield source.name


def _select(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
