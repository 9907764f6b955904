"""The models of several runs, each held in memory once: runs on the same SFT model are adapters on one copy of it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForSequenceClassification

from rlhf.errors import RunError
from rlhf.finished.run import FinishedRun
from rlhf.models.export import load_adapter, saved_head
from rlhf.models.loading import DTYPES, load_causal_lm, load_whole
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.settings import is_quantized


class Part(NamedTuple):
    """A role and the models it is one of."""

    roles: Roles
    role: str


class Models:
    """Loads what runs need and nobody has loaded yet."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._bases: dict[Any, Roles] = {}
        self._rewards: dict[Path, Part] = {}

    def policy(self, run: FinishedRun) -> Part:
        """What answers.

        Raises:
            RunError: a reward model.
            ModelError: it cannot be loaded.
        """
        if run.stage == "reward":
            raise RunError(f"{run.folder} is a reward model, which says nothing; allowed: stage=sft or stage=ppo")
        return self._part(run)

    def reward(self, run: FinishedRun) -> Part:
        """A reward model, with its head."""
        place = run.folder.resolve()
        if place not in self._rewards:
            if run.base is None:
                options = {"num_labels": 1, "dtype": DTYPES[run.settings.dtype], "use_safetensors": True}
                model = load_whole(AutoModelForSequenceClassification, run.model, "reward model", **options)
                part = Part(Roles(model.eval(), DTYPES[run.settings.dtype]).to(self.device), "reference")
            else:
                part = self._part(run)
            head = part.roles.add_head(part.role, zero=False)
            with torch.no_grad():
                head.weight.copy_(saved_head(run.model))
            self._rewards[place] = part
        return self._rewards[place]

    def _part(self, run: FinishedRun) -> Part:
        roles = self._base(run)
        if run.base is None:
            return Part(roles, "reference")
        name = f"adapter{len(roles.table)}"
        load_adapter(roles, "base", name, run.model)
        roles.table[name] = Role("base", name)
        return Part(roles.to(self.device), name)

    def _base(self, run: FinishedRun) -> Roles:
        folder, quantization = run.base or run.model, run.config["quantization"]
        used = quantization if is_quantized(quantization) else None
        key = (*_files(folder), run.settings.dtype, json.dumps(used))
        if key not in self._bases:
            base = load_causal_lm(run.settings, run.tokenizer(), folder, used)
            self._bases[key] = Roles(base, DTYPES[run.settings.dtype]).to(self.device)
        return self._bases[key]

    def __len__(self) -> int:
        """How many policies' bases are in memory."""
        return len(self._bases)


@torch.no_grad()
def score(part: Part, prompt: list[int], response: list[int]) -> float:
    """The uncentred score of a reward model."""
    batch = Sequences.from_lists([prompt], [response]).to(part.roles.device)
    return float(part.roles.last_token_scores(part.role, batch))


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Weights by name, size and time: a run of stage=sft has a copy of the cached model that others stand on."""
    stats = ((path.name, path.stat()) for path in sorted(folder.glob("*.safetensors")))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
