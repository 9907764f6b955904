"""TensorBoard: Lightning's logger, extended by answers, histograms and what guards have found."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from rlhf.tracking.continuing import Line
from rlhf.tracking.metrics_file import metrics_of


class TensorBoard(TensorBoardLogger):
    """Event files with the metrics of a stage, its evaluated answers as texts, and histograms of its rollouts."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics of a step, and wait until they are in the file: a kill must not lose the last minutes."""
        super().log_metrics(metrics, step)
        self.experiment.flush()

    @rank_zero_only
    def continue_from(self, kept: Sequence[Line], forgotten: int | None) -> None:
        """Have TensorBoard ignore what is in earlier event files of step `forgotten` and later; send again what stays.

        Only at that step itself something may stay, and its histograms are lost.
        """
        if forgotten is None:
            return
        self.close()
        self._kwargs["purge_step"] = forgotten
        for line in kept:
            if line["step"] >= forgotten:
                self.log_metrics(metrics_of(line), line["step"])
        self.experiment.flush()

    def close(self) -> None:
        """End the present event file; the next metrics begin another."""
        if self._experiment is not None:
            self._experiment.close()
            self._experiment = None

    @rank_zero_only
    def log_samples(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log the evaluated responses of a step as a text, in Markdown."""
        self.experiment.add_text("samples", "\n\n---\n\n".join(map(_shown, records)), step)

    @rank_zero_only
    def log_histograms(self, scores: Tensor, ratio_counts: Tensor | None, largest_ratio: float, step: int) -> None:
        """As `rlhf.tracking.dashboards.Dashboard.log_histograms`."""
        finite = scores[scores.isfinite()].float().cpu()
        if len(finite):
            self.experiment.add_histogram("histogram/reward", finite, step)
        if ratio_counts is not None and ratio_counts.sum() > 0:
            counts = ratio_counts.double().cpu()
            width = largest_ratio / len(counts)
            edges = [width * (bin + 1) for bin in range(len(counts))]
            centres = counts.new_tensor(edges) - width / 2
            self.experiment.add_histogram_raw(
                "histogram/ratio", min=0.0, max=largest_ratio, num=int(counts.sum()), bucket_limits=edges,
                sum=float(counts @ centres), sum_squares=float(counts @ centres**2), bucket_counts=counts.tolist(),
                global_step=step,
            )  # fmt: skip

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        """Log what a guard has found, as a text under its name."""
        self.experiment.add_text(title, text)


def _shown(record: Mapping[str, Any]) -> str:
    """A record of `samples.jsonl`: its texts as quotations, its numbers on a line."""
    texts = [f"**{key}**\n\n{_quoted(value)}" for key, value in record.items() if isinstance(value, str)]
    numbers = [f"{key} {value:.3g}" for key, value in record.items() if isinstance(value, int | float)]
    return "\n\n".join([*texts, ", ".join(numbers)])


def _quoted(text: str) -> str:
    """A text as Markdown shows it unchanged, whatever it holds."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
