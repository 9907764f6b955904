"""The models of several runs, loaded once each: runs on the same SFT model are adapters on one copy of it."""

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


class LoadedRole(NamedTuple):
    """The name of a role and the `Roles` that hold its model."""

    roles: Roles
    role: str


class ModelCache:
    """Loads policies and reward models, and keeps them for other runs that need the same."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._bases: dict[Any, Roles] = {}
        self._rewards: dict[Path, LoadedRole] = {}

    def policy(self, run: FinishedRun) -> LoadedRole:
        """The language model of a run of stage=sft, or of a stage that trains a policy.

        Raises:
            RunError: the run is of stage=reward.
            ModelError: the model cannot be loaded.
        """
        if run.stage == "reward":
            raise RunError(
                f"{run.folder} is a reward model, which generates no text; allowed: stage=sft or stage=ppo and its like"
            )
        return self._load_role(run)

    def reward(self, run: FinishedRun) -> LoadedRole:
        """The reward model of a run of stage=reward, with its scalar head.

        Raises:
            ModelError: the model cannot be loaded.
        """
        place = run.folder.resolve()
        if place not in self._rewards:
            if run.base is None:
                options = {"num_labels": 1, "dtype": DTYPES[run.settings.dtype], "use_safetensors": True}
                model = load_whole(AutoModelForSequenceClassification, run.model, "reward model", **options)
                part = LoadedRole(Roles(model.eval(), DTYPES[run.settings.dtype]).to(self.device), "reference")
            else:
                part = self._load_role(run)
            head = part.roles.add_head(part.role, zero=False)
            with torch.no_grad():
                head.weight.copy_(saved_head(run.model))
            self._rewards[place] = part
        return self._rewards[place]

    def _load_role(self, run: FinishedRun) -> LoadedRole:
        """The base itself, if the run trained all weights, else the run's adapter on its base."""
        roles = self._base(run)
        if run.base is None:
            return LoadedRole(roles, "reference")
        name = f"adapter{len(roles.table)}"
        load_adapter(roles, "base", name, run.model)
        roles.table[name] = Role("base", name)
        return LoadedRole(roles.to(self.device), name)

    def _base(self, run: FinishedRun) -> Roles:
        """The base model of a run, shared with runs that have the same weights, dtype and quantization."""
        folder, quantization = run.base or run.model, run.config["quantization"]
        used = quantization if is_quantized(quantization) else None
        key = (*_files(folder), run.settings.dtype, json.dumps(used))
        if key not in self._bases:
            base = load_causal_lm(run.settings, run.tokenizer(), folder, used)
            self._bases[key] = Roles(base, DTYPES[run.settings.dtype]).to(self.device)
        return self._bases[key]

    def __len__(self) -> int:
        """The number of base models in memory."""
        return len(self._bases)


@torch.no_grad()
def score(part: LoadedRole, prompt: list[int], response: list[int]) -> float:
    """The score of a response by a reward model, given token ids; not centred."""
    batch = Sequences.from_lists([prompt], [response])
    return float(part.roles.last_token_scores(part.role, batch))


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and modification time of the weight files, which identify a model.

    Not its path, because the folder of a run of stage=sft holds a copy of the cached SFT model.
    """
    stats = ((path.name, path.stat()) for path in sorted(folder.glob("*.safetensors")))
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
