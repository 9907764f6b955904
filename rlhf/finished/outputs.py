"""Policies without a model: answers that are read from a file or taken from the data set."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.records import DataSource, Prompt
from rlhf.data.sources import Source
from rlhf.errors import DataError
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.files.digests import content_digest
from rlhf.settings import Settings

log = logging.getLogger(__name__)
SHOWN = 80  # characters of an instruction in an error message


@dataclass(frozen=True)
class ReferenceOutputs:
    """The reference outputs of the evaluation set."""

    label: str

    def identity(self, known: Path | None = None) -> dict[str, Any]:
        """Nothing decides these answers but the prompts, which include them."""
        return {"reference": True}

    def answers(self, prompts: Sequence[Prompt], settings: Settings, source: DataSource) -> list[str]:
        """The reference output of each prompt.

        Raises:
            DataError: a prompt has none.
        """
        missing = [row for row in prompts if not row.reference_output]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(prompts)} evaluation prompts have no reference output, such as "
                f"{instruction_or_prompt(missing[0])[:SHOWN]!r}; allowed: other policies than {self.label}"
            )
        return [row.reference_output for row in prompts]


@dataclass(frozen=True)
class OutputsFile:
    """A file of outputs in AlpacaEval's format: rows with `instruction`, `output` and perhaps `generator`.

    A row may also have its `input` apart, as AlpacaFarm's do. An instruction that occurs several times, here and among
    the prompts, has its outputs in the same order there.
    """

    label: str
    path: Path
    outputs: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, path: Path) -> "OutputsFile":
        """Read a file; its label is the `generator` if all rows have the same.

        Raises:
            DataError: the file does not exist, or a row lacks its instruction or output.
        """
        source = Source(str(path), path)
        source.check()
        outputs: dict[str, list[str]] = {}
        generators = set()
        for number, row in source.rows():
            instruction, output = (row.get(key) if isinstance(row, dict) else None for key in ("instruction", "output"))
            if not isinstance(instruction, str) or not isinstance(output, str):
                raise DataError(
                    f"{path}, row {number}: it has no text as instruction or output; allowed: rows in AlpacaEval's "
                    "format, with instruction, output and generator"
                )
            whole = f"{instruction}\n\n{row['input']}" if row.get("input") else instruction
            outputs.setdefault(whole.strip(), []).append(output)
            generators.add(row.get("generator"))
        (label,) = generators if len(generators) == 1 else (None,)
        return cls(str(label or path.name.partition(".")[0]), path, outputs)

    def identity(self, known: Path | None = None) -> dict[str, Any]:
        """The content of the file."""
        return {"outputs": content_digest(self.path, known)}

    def answers(self, prompts: Sequence[Prompt], settings: Settings, source: DataSource) -> list[str]:
        """The output to each prompt's instruction.

        Raises:
            DataError: the file has none for one of them.
        """
        instructions = [instruction_or_prompt(row).strip() for row in prompts]
        missing = [text for text in instructions if text not in self.outputs]
        if missing:
            raise DataError(
                f"{self.path} has no output for {len(missing)} of the {len(prompts)} evaluation instructions, such as "
                f"{missing[0][:SHOWN]!r}; allowed: a file that answers all of them"
            )
        seen: dict[str, int] = {}
        answers = []
        for text in instructions:
            place = seen.get(text, 0)
            answers.append(self.outputs[text][min(place, len(self.outputs[text]) - 1)])
            seen[text] = place + 1
        return answers
