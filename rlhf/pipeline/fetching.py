"""What a run would fetch from the Hub: checkpoints, tokenizers and data sets, found in its configuration."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rlhf.data.sources import Source
from rlhf.errors import DataError

# The keys that name a checkpoint or a tokenizer by a Hub id or a folder.
CHECKPOINTS = (
    "model.name_or_path", "model.tokenizer", "sft.from", "sft.difference_to", "reward.from", "reward.difference_to",
    "scorer.model", "evaluation.gold.model",
)  # fmt: skip
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@[\w./-]+)?")
NOT_SOURCES = frozenset({"template", "root", "on_bad_row", "shares", "max_rows"})


def checkpoints(plain: Mapping[str, Any]) -> dict[str, str]:
    """The Hub ids of checkpoints by the key that names each, and whether it is in the local cache."""
    found = {}
    for key in CHECKPOINTS:
        name = _select(plain, key)
        match = HUB_ID.fullmatch(name) if isinstance(name, str) and not Path(name).expanduser().exists() else None
        if match:
            held = any(
                isinstance(try_to_load_from_cache(match[1], file), str)
                for file in ("config.json", "adapter_config.json")
            )
            found[key] = f"{name}, {'in the local cache' if held else 'to be fetched'}"
    return found


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
