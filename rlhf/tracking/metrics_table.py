"""`metrics.csv`: the lines of metrics.jsonl as a table, with a row per step and a column per metric."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors.machine import writing
from rlhf.files import aside
from rlhf.tracking.continuing import Line
from rlhf.tracking.metrics_file import FileLogger, metrics_of

TABLE = "metrics.csv"


class MetricsTable(FileLogger):
    """Writes `metrics.csv` into the folder `save_dir`, with the steps in order.

    The row of a new step is appended. The whole table is written anew, atomically, when a column appears, when a step
    that has a row is evaluated as well, and when a run resumes. A cell is empty where a step has no such metric.
    """

    def __init__(self, save_dir: str):
        super().__init__(Path(save_dir) / TABLE)
        self.columns = ["step"]
        self.rows: dict[int, dict[str, Any]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add the metrics of a step to its row."""
        step = step or 0
        later = bool(self.rows) and step > max(self.rows)
        if self._add(metrics, step) or not later:
            self._write()
            return
        with writing(self.path), self.path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(self.rows[step])

    def continue_from(self, kept: Sequence[Line], forgotten: int | None = None) -> None:
        """Write the table of the lines `kept`, whatever was there."""
        self.columns, self.rows = ["step"], {}
        for line in kept:
            self._add(metrics_of(line), line["step"] or 0)
        if kept or self.path.exists():
            self._write()

    def _add(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether metrics have come that have had no column yet."""
        new = [key for key in metrics if key not in self.columns]
        self.columns += new
        self.rows.setdefault(step, {"step": step}).update(metrics)
        return bool(new)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with aside(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows[step] for step in sorted(self.rows))
