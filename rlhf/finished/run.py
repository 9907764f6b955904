"""A finished run, for commands that use its models: what it is, and where that on which it stands lies.

Nothing here waits for torch, so that a mistaken folder is told at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import RunError
from rlhf.files import ADAPTER_CONFIG, MODEL, SUMMARY, read_object
from rlhf.files.checksums import damage
from rlhf.schema import typed
from rlhf.settings import ModelSettings
from rlhf.tracking.reading import renamed_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, or one of the SFT and reward models that runs share (`outputs/cache/…`)."""

    folder: Path
    summary: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "FinishedRun":
        """The finished run in `folder`.

        Raises:
            RunError: there is none, or it has no model.
        """
        if not folder.is_dir():
            raise RunError(f"{folder}: there is no such folder; allowed: a run, such as outputs/rlhf/default")
        if not (folder / SUMMARY).exists():
            raise RunError(f"{folder} holds no {SUMMARY}: it is not the folder of a finished run")
        summary = read_object(folder / SUMMARY, stage=str, config=dict, metrics=dict)
        run = cls(folder, {**summary, "config": renamed_config(summary["config"])})
        if not run.model.is_dir():
            raise RunError(f"{folder} has no model; allowed: a run of stage=sft, stage=reward or stage=ppo")
        _check(run.model)
        return run

    @property
    def model(self) -> Path:
        """What plain peft or transformers load."""
        return self.folder / MODEL

    @property
    def stage(self) -> str:
        """`sft`, `reward` or `ppo`."""
        return str(self.summary["stage"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.summary["config"]

    @property
    def settings(self) -> ModelSettings:
        """Those of the model."""
        return typed(ModelSettings, self.config["model"], "model.")

    @property
    def metrics(self) -> dict[str, float]:
        """The final ones."""
        return self.summary["metrics"]

    @property
    def base(self) -> Path | None:
        """The SFT model below the run's adapter; None where `model` is whole.

        Raises:
            RunError: it is gone, or damaged.
        """
        if not (self.model / ADAPTER_CONFIG).exists():
            return None
        told = read_object(self.model / ADAPTER_CONFIG, base_model_name_or_path=str)
        noted = Path(told["base_model_name_or_path"])
        base = noted if noted.is_dir() else self._cached(noted.parent.name) / MODEL
        _check(base)
        return base

    @property
    def reward(self) -> "FinishedRun | None":
        """The reward model that scored the run's answers; None if there was none.

        Raises:
            RunError: it is gone.
        """
        name = self.summary.get("reward_model")
        return FinishedRun.open(self._cached(name)) if name else None

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that the run was trained with.

        Raises:
            ModelError: it cannot be read.
        """
        from transformers import AutoTokenizer

        from rlhf.errors import explained

        with explained(f"{self.model}: no tokenizer could be loaded"):
            return AutoTokenizer.from_pretrained(self.model, trust_remote_code=self.settings.trust_remote_code)

    def _cached(self, name: str) -> Path:
        """`cache/<name>` of the outputs that hold the run, wherever they were moved."""
        places = [parent / "cache" / name for parent in self.folder.resolve().parents]
        found = next((place for place in places if (place / SUMMARY).exists()), None)
        if found is None:
            raise RunError(f"{self.folder} was trained on {name}, which is not in the cache beside it any more")
        return found


def _check(model: Path) -> None:
    """See whether a model is what was written; one that was taken over lies with the run that it was taken from."""
    folder = model.resolve().parent
    wrong = damage(folder) if (folder / SUMMARY).exists() else None
    if wrong:
        raise RunError(f"{folder} is damaged: {wrong}; with its {SUMMARY} moved away, its own command makes it whole")
