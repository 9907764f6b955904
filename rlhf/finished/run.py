"""A finished run on disk: its summary, its model, and the models it depends on.

`rlhf.pipeline.run.Run` makes a run; `FinishedRun` here only reads what it left. torch is not imported, so that a wrong
folder is reported at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import RunError
from rlhf.files import ADAPTER_CONFIG, BEST_MODEL, KEPT, MODEL, NOTE, SUMMARY, read_object
from rlhf.files.checksums import damage
from rlhf.policy_settings import METHODS
from rlhf.schema import typed
from rlhf.settings import ModelSettings
from rlhf.tracking.reading import renamed_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.data.templates import PromptTemplate


@dataclass(frozen=True)
class FinishedRun:
    """The folder of a finished run, or of an SFT or reward model that runs share (`outputs/cache/…`).

    Attributes:
        folder: contains `summary.json` and `model/`.
        summary: the content of `summary.json`.
        chosen: which of its models is meant: `model`, `model_best` or `kept/step-000020`.
    """

    folder: Path
    summary: dict[str, Any]
    chosen: str = MODEL

    @classmethod
    def open(cls, folder: Path, chosen: str = MODEL) -> "FinishedRun":
        """Read the summary in `folder` and check the model's files.

        Raises:
            RunError: there is no finished run, or its model is missing or damaged.
            DamagedError: the summary cannot be read.
        """
        if not folder.is_dir():
            raise RunError(f"{folder}: there is no such folder; allowed: a run, such as outputs/rlhf/default")
        if not (folder / SUMMARY).exists():
            check_ended(folder)
            raise RunError(f"{folder} holds no {SUMMARY}: it is not the folder of a finished run")
        summary = read_object(folder / SUMMARY, stage=str, config=dict, metrics=dict)
        run = cls(folder, {**summary, "config": renamed_config(summary["config"])}, chosen)
        if chosen != MODEL and not run.model.is_dir():
            raise RunError(f"{folder} has no {chosen}; allowed: {folder}, its last policy, or another that it has kept")
        if not run.model.is_dir():
            raise RunError(f"{folder} has no model; allowed: a run of stage=sft, reward or {', '.join(METHODS)}")
        _check(run.model)
        return run

    @property
    def model(self) -> Path:
        """The model's folder, in the format of peft (an adapter) or transformers (all weights)."""
        return self.folder / self.chosen

    @property
    def stage(self) -> str:
        """`sft`, `reward` or a method by which the run trained a policy."""
        return str(self.summary["stage"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run."""
        return self.summary["config"]

    @property
    def data(self) -> dict[str, Any]:
        """The config group `data` of the run. A chat template is that of the run's own tokenizer, saved with its model.

        So it can be used where the model is not that the run began with.
        """
        data = self.config["data"]
        if "name_or_path" not in (data.get("template") or {}):
            return data
        elsewhere = {"name_or_path": str(self.model), "tokenizer": None, "gguf_file": None, "chat_template": None}
        return {**data, "template": {**data["template"], **elsewhere}}

    @property
    def template(self) -> "PromptTemplate | None":
        """The prompt template that the run was trained with, if its data set has one."""
        from rlhf.data.options import parse_template

        return parse_template(self.data["template"]) if self.data.get("template") else None

    @property
    def settings(self) -> ModelSettings:
        """The config group `model` of the run."""
        return typed(ModelSettings, self.config["model"], "model.")

    @property
    def metrics(self) -> dict[str, float]:
        """The final metrics of the run."""
        return self.summary["metrics"]

    @property
    def base(self) -> Path | None:
        """The SFT model that the run's adapter was trained on; None if `model` holds all weights.

        Raises:
            RunError: the SFT model is missing or damaged.
        """
        if not (self.model / ADAPTER_CONFIG).exists():
            return None
        adapter = read_object(self.model / ADAPTER_CONFIG, base_model_name_or_path=str)
        recorded = Path(adapter["base_model_name_or_path"])
        base = recorded if recorded.is_dir() else self._cached(recorded.parent.name) / MODEL
        _check(base)
        return base

    @property
    def sft(self) -> "FinishedRun":
        """The SFT model that the run started from; an SFT model itself is its own.

        Raises:
            RunError: it is missing or damaged, or the run does not say which one it was.
        """
        if self.stage == "sft":
            return self
        name = self.summary.get("sft_model")
        found = self._in_cache(name) if name else None
        if found is not None:
            return FinishedRun.open(found)
        reward = self.reward if self.reward_reads == "ids" else None
        base = self.base or (reward.base if reward else None)
        if base is None and name:
            self._cached(name)  # raises
        if base is None:
            raise RunError(f"{self.folder} trained all weights, and does not say which SFT model it started from")
        return FinishedRun.open(base.parent)

    @property
    def reward_reads(self) -> str:
        """What the reward model reads: `ids` of the policy, or texts, with a tokenizer of its own."""
        return str(self.summary.get("reward_reads", "ids"))

    @property
    def reward(self) -> "FinishedRun | None":
        """The reward model that the run was trained against; None if it used another scorer.

        Raises:
            RunError: the reward model is missing or damaged.
        """
        name = self.summary.get("reward_model")
        return FinishedRun.open(self._cached(name)) if name else None

    @property
    def members(self) -> "list[FinishedRun]":
        """The reward models that the run was trained against besides `reward`; none without an ensemble.

        Raises:
            RunError: one of them is missing or damaged.
        """
        return [FinishedRun.open(self._cached(name)) for name in self.summary.get("reward_members", [])]

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that the run was trained with.

        Raises:
            ModelError: the tokenizer cannot be read.
        """
        from transformers import AutoTokenizer

        from rlhf.errors import explained

        with explained(f"{self.model}: no tokenizer could be loaded"):
            return AutoTokenizer.from_pretrained(self.model, trust_remote_code=self.settings.trust_remote_code)

    def _cached(self, name: str) -> Path:
        """The folder `cache/<name>`, which must be there."""
        found = self._in_cache(name)
        if found is None:
            raise RunError(f"{self.folder} was trained on {name}, which is not in the cache beside it any more")
        return found

    def _in_cache(self, name: str) -> Path | None:
        """The folder `cache/<name>` beside any parent of the run's folder, since outputs may have been moved."""
        places = [parent / "cache" / name for parent in self.folder.resolve().parents]
        return next((place for place in places if (place / SUMMARY).exists()), None)


def located(path: Path) -> tuple[Path, str] | None:
    """The folder of the finished run, and which of its models, that a path means; None for another path.

    A path is that of the run, whose last policy is then meant, or of one of its models.
    """
    places = [(path, MODEL)]
    if path.name in (MODEL, BEST_MODEL):
        places.append((path.parent, path.name))
    if path.parent.name == KEPT:
        places.append((path.parent.parent, f"{KEPT}/{path.name}"))
    return next((place for place in places if (place[0] / SUMMARY).exists()), None)


def check_ended(folder: Path) -> None:
    """Check that a folder is not that of a run which is under way or was stopped.

    Raises:
        RunError: it is one.
    """
    if (folder / NOTE).exists() and not (folder / SUMMARY).exists():
        raise RunError(f"{folder} is a run that has not ended; allowed: a finished one (its own command continues it)")


def _check(model: Path) -> None:
    """Compare a model's files with their checksums.

    Raises:
        RunError: a file differs or is missing.
    """
    folder = model.resolve().parent  # the model of a run that was taken over is a link into the original run
    folder = folder.parent if folder.name == KEPT else folder
    wrong = damage(folder) if (folder / SUMMARY).exists() else None
    if wrong:
        raise RunError(
            f"{folder} is damaged: {wrong}; move its {SUMMARY} away, and the command of this run makes the model again"
        )
