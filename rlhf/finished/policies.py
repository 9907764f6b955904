"""Any policy that can be judged, named by one word: a finished run, another model, a file of outputs, the references.

A policy has a label and answers evaluation prompts. Opening one reads configurations only, so that a wrong word is
reported at once: neither torch nor weights are loaded before `Policy.answers`.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.data.records import DataSource, Prompt
from rlhf.data.sources import SUFFIXES
from rlhf.errors import RunError
from rlhf.files import BEST_MODEL, KEPT, MODEL, SUMMARY
from rlhf.files.digests import content_digest
from rlhf.finished.outputs import OutputsFile, ReferenceOutputs
from rlhf.finished.outside import CHAT, OutsideModel
from rlhf.finished.run import FinishedRun, check_ended, located
from rlhf.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE = "reference"
SFT = "@sft"
ALLOWED = (
    f"a finished run (RUN or RUN/{MODEL}, RUN/{BEST_MODEL}, RUN/{KEPT}/step-000020, or RUN{SFT} for its SFT model), a "
    f"model or peft adapter as a folder or as OWNER/NAME[@REVISION] on the Hub ({CHAT} in front of it: in its own chat "
    f"template), a file of outputs in AlpacaEval's format, or {REFERENCE} for the reference outputs"
)
HUB = re.compile(r"([\w-][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?")


class Policy(Protocol):
    """Answers evaluation prompts.

    Attributes:
        label: a short name for tables.
    """

    @property
    def label(self) -> str: ...  # noqa: D102

    def identity(self, known: Path | None = None) -> dict[str, Any]:
        """What decides the answers, beside prompts and decoding; `known` is a folder that caches digests of files."""
        ...

    def answers(self, prompts: Sequence[Prompt], settings: Settings, source: DataSource) -> list[str]:
        """One answer per prompt, decoded as `settings.evaluation` and `settings.generation` say.

        Answers of a model are of the class `rlhf.models.tokenizing.Response`.

        Raises:
            UserError: a model cannot be loaded, or there is no answer to one of the prompts.
        """
        ...


@dataclass(frozen=True)
class RunPolicy:
    """The policy of a finished run of stage=sft, or of a stage that trains a policy.

    Prompts are put into the template that it was trained with, if that is not the one of the data.
    """

    label: str
    run: FinishedRun

    def identity(self, known: Path | None = None) -> dict[str, Any]:
        """The content of the model and of the SFT model below it."""
        folders = [folder for folder in (self.run.model, self.run.base) if folder is not None]
        return {
            "models": [content_digest(folder, known) for folder in folders],
            "quantization": self.run.config["quantization"],
            "template": self.run.config["data"].get("template"),
        }

    def answers(self, prompts: Sequence[Prompt], settings: Settings, source: DataSource) -> list[str]:
        """Sample one answer per prompt, on weights of the run's own dtype and quantization.

        Raises:
            ModelError: the model cannot be loaded.
        """
        from rlhf.finished import answering  # imports torch
        from rlhf.finished.chat.models import ModelCache

        part, tokenizer = ModelCache().policy(self.run), self.run.tokenizer()
        return answering.sample(self.label, part, tokenizer, prompts, settings, source, self.run.template)


def open_policy(word: str, allowed: str = ALLOWED) -> Policy:
    """The policy that a word names; `allowed` lists what a word may be, for messages.

    Raises:
        RunError: it names none.
        DataError: it is a file that cannot be read.
    """
    if word == REFERENCE:
        return ReferenceOutputs(REFERENCE)
    name, chat = word.removeprefix(CHAT), word.startswith(CHAT)
    path = Path(name).expanduser()
    if not chat:
        if path.is_file() or name.lower().endswith(SUFFIXES):
            return OutputsFile.read(path)
        run = _run(name, path, allowed)
        if run is not None:
            return run
    if path.is_dir():
        return OutsideModel.find(f"{CHAT * chat}{path.resolve().name}", name, chat)
    folder, at, _ = name.rpartition("@")
    if at and Path(folder).expanduser().is_dir():
        raise RunError(f"{word}: only models on the Hub have revisions; allowed: {folder}, or for a run {folder}{SFT}")
    hub = HUB.fullmatch(name)
    if hub is None or name.startswith((".", "~")):
        raise RunError(f"{word}: there is no such file or folder; allowed: {allowed}")
    return OutsideModel.find(word, name, chat)


def place_of(policy: Policy) -> Path | None:
    """The file or folder that holds a policy; None for the reference outputs, and for a model in two templates."""
    if isinstance(policy, RunPolicy):
        return policy.run.model.resolve()
    if isinstance(policy, OutsideModel):
        return None if policy.chat else policy.checkpoint.folder.resolve()
    return policy.path.resolve() if isinstance(policy, OutputsFile) else None


def tokenizer_of(policy: Policy) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a policy's model; None if it has none, or one that needs code of its own."""
    if isinstance(policy, RunPolicy):
        return policy.run.tokenizer()
    return policy.checkpoint.tokenizer if isinstance(policy, OutsideModel) else None


def _run(word: str, path: Path, allowed: str) -> "RunPolicy | None":
    """The policy of a finished run, by its folder, a model in it, or the run and `@sft`; None for another word."""
    sft = word.endswith(SFT)
    folder, chosen = Path(word.removesuffix(SFT)).expanduser(), MODEL
    if not sft:
        found = located(path)
        if found is None:
            check_ended(path)
            return None
        folder, chosen = found
    elif not (folder / SUMMARY).exists():
        check_ended(folder)
        raise RunError(f"{word}: {folder} is not the folder of a finished run; allowed: {allowed}")
    name = Path(os.path.abspath(folder)).name  # that of a link, not of its target
    if sft:
        return RunPolicy(f"{name}{SFT}", FinishedRun.open(folder).sft)
    run = FinishedRun.open(folder, chosen)
    if run.stage == "reward":
        raise RunError(f"{word} is a reward model, which generates no text; allowed: {allowed}")
    _ = run.base  # raises now if the SFT model is missing
    return RunPolicy(name if chosen == MODEL else f"{name}/{chosen}", run)
