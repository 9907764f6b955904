"""Writes outputs in the JSON format of the public `alpaca_eval` tool, so that the tool can judge them too."""

from collections.abc import Sequence
from pathlib import Path

from rlhf.data.records import Prompt
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.files import ALPACA_EVAL, ALPACA_EVAL_REFERENCE, write_json


def export(folder: Path, prompts: Sequence[Prompt], responses: Sequence[str], generator: str, dataset: str) -> None:
    """Write `alpaca_eval.json` and, if every prompt has a reference output, `alpaca_eval_reference.json`.

    `alpaca_eval --model_outputs RUN/alpaca_eval.json --reference_outputs RUN/alpaca_eval_reference.json` compares them.
    As in the tool's own files, an instruction includes its input, separated by a blank line.

    Args:
        folder: Where to write the files.
        prompts: The evaluation prompts.
        responses: One response per prompt.
        generator: The name of the model that wrote the responses.
        dataset: The name of the data set.
    """
    instructions = [instruction_or_prompt(row) for row in prompts]

    def rows(outputs: Sequence[str], writer: str) -> list[dict[str, str]]:
        return [
            {"dataset": dataset, "instruction": instruction, "output": output, "generator": writer}
            for instruction, output in zip(instructions, outputs, strict=True)
        ]

    write_json(folder / ALPACA_EVAL, rows(responses, generator))
    if all(row.reference_output for row in prompts):
        write_json(folder / ALPACA_EVAL_REFERENCE, rows([row.reference_output for row in prompts], "reference"))
