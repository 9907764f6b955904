"""Weight differences, as AlpacaFarm publishes them (`…-wdiff`): base + difference in one pass, one tensor at a time.

AlpacaFarm's LLaMA has a pad token more than its base, whose embedding is the mean of all others before the difference
is added. `model_sum.txt` beside the differences is the sum of all weights that must come out.
"""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.errors import ModelError, explained
from rlhf.errors.machine import writing

log = logging.getLogger(__name__)
SHARD = 2**30  # bytes of weights that are held until they are written
SUM, TOLERANCE = "model_sum.txt", 1e-5  # the published sum, and the relative difference that is published with it
TRUNK, HEAD = "backbone_model.", "reward_head."  # how AlpacaFarm's reward models name their parts
ROTARY = "rotary_emb.inv_freq"  # constants that transformers kept among the weights of Llama until 4.31


class Weights:
    """The tensors in a model's folder by name, read one at a time: safetensors, or else pickles without code.

    Raises:
        ModelError: there are none, or they cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise ModelError(f"{folder} has no weights; allowed: model*.safetensors or pytorch_model*.bin")
        self._open: tuple[Path | None, Any] = (None, None)
        self._places = {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        """The tensor in float32."""
        file = self._places[name]
        with explained(f"{file} cannot be read"):
            content = self._file(file)
            return (content[name] if isinstance(content, dict) else content.get_tensor(name)).float()

    def rows(self, name: str) -> int:
        """The number of rows of a matrix, which may be that of AlpacaFarm's trunk.

        Raises:
            ModelError: there is no such matrix.
        """
        name = name if name in self else f"{TRUNK}{name}"
        if name not in self:
            raise ModelError(f"{self.folder} has no {name.removeprefix(TRUNK)}")
        content = self._file(self._places[name])
        return int(content[name].shape[0] if isinstance(content, dict) else content.get_slice(name).get_shape()[0])

    def _file(self, file: Path) -> Any:
        """An open file; one at a time is open. Pickles are mapped, so that only what is used is read."""
        if self._open[0] != file:
            with explained(f"{file} cannot be read"):
                if file.suffix == ".bin":
                    content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                else:
                    content = safe_open(file, "pt")
            self._open = (file, content)
        return self._open[1]


def recover(
    folder: Path, differences: Path, base: Path | None, skeleton: PreTrainedModel, dtype: torch.dtype
) -> dict[str, float]:
    """Write base + differences into `folder` as weights of `skeleton`, in `dtype`; check the published sum.

    Without a base, the weights are already whole, in AlpacaFarm's format for reward models. At most `SHARD` bytes and a
    few copies of the largest tensor are held.

    Args:
        folder: of the new model; its configuration is written by the caller.
        differences: the folder with differences, and `model_sum.txt` if there is one.
        base: the folder of the model that they are added to.
        skeleton: the model without weights: what must be there, and of which shape.
        dtype: of the written weights; sums are made in float32.

    Returns:
        `sum`, and `bias` if a reward model has one: it is the same for all texts, and left out.

    Raises:
        ModelError: weights cannot be read, do not fit each other or `skeleton`, or have another sum than the published.
    """
    changes, below = Weights(differences), Weights(base) if base else None
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    shards, found, written = _Shards(folder), {"sum": 0.0}, set()
    for name in changes:
        if name.endswith(ROTARY):
            continue
        tensor = _whole(changes[name], name.removeprefix(TRUNK), below, differences)
        found["sum"] += float(tensor.sum())
        if name == f"{HEAD}bias":
            found["bias"] = float(tensor)
        target = name.replace(f"{HEAD}weight", "score.weight").removeprefix(TRUNK)
        if target not in expected:  # a language-model head of a reward model
            continue
        if tuple(tensor.shape) != expected[target]:
            raise ModelError(f"{differences}: {name} has shape {list(tensor.shape)}, not {list(expected[target])}")
        shards.add(target, tensor if target == "score.weight" else tensor.to(dtype))
        written.add(target)
    shards.close()
    _check_names(skeleton, expected.keys() - written, differences)
    _check_sum(found["sum"], _rotary(changes, below, skeleton.config), differences)
    return found


def _whole(difference: Tensor, name: str, below: Weights | None, where: Path) -> Tensor:
    """The sum of a difference and the base's tensor of that name, whose missing rows are the mean of the others."""
    if below is None or name.startswith(HEAD):
        return difference
    if name not in below:
        raise ModelError(
            f"{where}: there is no {name} in {below.folder}, so that these are no differences to that model"
        )
    own = below[name]
    if own.dim() == 2 and own.shape[1:] == difference.shape[1:] and len(own) < len(difference):
        own = torch.cat([own, own.mean(0, keepdim=True).expand(len(difference) - len(own), -1)])
    if own.shape != difference.shape:
        raise ModelError(
            f"{where}: {name} has shape {list(difference.shape)}, and {list(own.shape)} in {below.folder}, so that "
            "these are no differences to that model"
        )
    return own.add_(difference)


def _check_names(skeleton: PreTrainedModel, missing: set[str], where: Path) -> None:
    tied = skeleton.get_output_embeddings() if skeleton.config.get_text_config().tie_word_embeddings else None
    missing = {name for name in missing if tied is None or skeleton.get_submodule(name.rpartition(".")[0]) is not tied}
    if missing:
        raise ModelError(f"{where}: {len(missing)} weights are missing, such as {min(missing)}")


def _rotary(changes: Weights, below: Weights | None, config: PreTrainedConfig) -> float:
    """The sum of the constants that were once weights: as stored, or else from the configuration."""
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    theta = (getattr(text, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    computed = float((theta ** -(torch.arange(0, size, 2).float() / size)).sum())
    stored = [name for name in changes if name.endswith(ROTARY)]
    if not stored or below is None:
        return computed * text.num_hidden_layers
    names = [(name, name.removeprefix(TRUNK)) for name in stored]
    return sum(float(changes[a].sum()) + (float(below[b].sum()) if b in below else computed) for a, b in names)


def _check_sum(total: float, constants: float, where: Path) -> None:
    """Compare with the published sum, which may or may not include the constants."""
    path = where / SUM
    if not path.exists():
        log.warning("%s has no %s, so that the sum of the weights (%.4f) cannot be checked", where, SUM, total)
        return
    with explained(f"{path} holds no number"):
        published = float(path.read_text(encoding="utf-8"))
    if not any(math.isclose(total + extra, published, rel_tol=TOLERANCE) for extra in (0.0, constants)):
        raise ModelError(
            f"{where}: the weights add up to {total:.4f}, and should to {published:.4f} ({SUM}); the base is another "
            "model than the differences were made from, or a file is damaged"
        )
    log.info("the weights add up to %.4f, as published", published)


class _Shards:
    """Writes tensors into files of about `SHARD` bytes, with transformers' index of which is where."""

    def __init__(self, folder: Path):
        self.folder, self.places, self.size = folder, dict[str, str](), 0
        self._held: dict[str, Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Hold a tensor, and write all that are held once they are many."""
        self._held[name] = tensor.contiguous()
        if sum(held.nbytes for held in self._held.values()) >= SHARD:
            self._write()

    def close(self) -> None:
        """Write what is still held, and the index."""
        if self._held:
            self._write()
        index = {"metadata": {"total_size": self.size}, "weight_map": self.places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _write(self) -> None:
        name = f"model-{len(set(self.places.values())) + 1:05d}.safetensors"
        with writing(self.folder / name):
            save_file(self._held, self.folder / name, metadata={"format": "pt"})
        self.places |= dict.fromkeys(self._held, name)
        self.size += sum(held.nbytes for held in self._held.values())
        self._held = {}
