"""The comparisons that `preferences=simulated` wrote to a folder, as a data source."""

from pathlib import Path
from typing import ClassVar

from datasets import Dataset

from rlhf.data.records import Split
from rlhf.files import read_lines

PREFERENCE_SPLITS: tuple[Split, ...] = ("preference", "preference_validation")


class SavedPreferences:
    """A data source with the comparisons that `rlhf.evaluation.preferences.Simulated.make` saved in a folder.

    It reads `preference.jsonl` and `preference_validation.jsonl`.
    """

    splits: ClassVar[tuple[Split, ...]] = PREFERENCE_SPLITS

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, split: Split) -> Dataset:
        """The rows of `split`, with the columns of `SampledComparison`."""
        return Dataset.from_list(read_lines(self.folder / f"{split}.jsonl"))
