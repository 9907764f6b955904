"""After a run was resumed, the files of its loggers hold every step once, in order, as metrics.jsonl does."""

import csv
from pathlib import Path
from typing import Any

import pytest

from rlhf.tracking.metrics_file import JsonLines, forget_after, is_kept, read_metrics
from rlhf.tracking.metrics_table import MetricsTable

ROWS = [
    {"step": "0", "eval/a": "0.5", "ppo/b": "", "guard/c": ""},
    {"step": "1", "eval/a": "", "ppo/b": "1.0", "guard/c": ""},
    {"step": "2", "eval/a": "0.25", "ppo/b": "2.0", "guard/c": ""},
    {"step": "3", "eval/a": "", "ppo/b": "3.0", "guard/c": "1"},
    {"step": "4", "eval/a": "0.125", "ppo/b": "4.0", "guard/c": ""},
]


def train(loggers: list[Any], first: int, last: int) -> None:
    """Log as a run of four steps does that is measured every second step, and where a guard finds something in one."""
    for step in range(first, last + 1):
        found = {"guard/c": 1} if step == 3 else {}
        lines: list[dict[str, Any]] = [{"ppo/b": float(step), **found}] if step else []
        lines += [{"eval/a": 0.5 ** (1 + step // 2), "time/evaluate": 1.0}] if step % 2 == 0 else []
        for line in lines:
            for logger in loggers:
                logger.log_metrics(line, step)


def resume(folder: Path, loggers: list[Any], step: int, evaluated: bool = True) -> None:
    """Bring metrics.jsonl and loggers to where a run resumes, as `rlhf.pipeline.train_supervised.keep_metrics` does."""
    forgotten = [line["step"] for line in read_metrics(folder) if not is_kept(line, step, evaluated)]
    forget_after(folder, step, evaluated)
    for logger in loggers:
        logger.continue_from(read_metrics(folder), min(forgotten, default=None))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [{key: cell for key, cell in row.items() if key != "time/evaluate"} for row in csv.DictReader(file)]


def loggers(folder: Path) -> list[Any]:
    return [JsonLines(folder), MetricsTable(str(folder))]


def test_a_table_has_a_row_per_step_with_all_its_metrics(tmp_path: Path) -> None:
    train(loggers(tmp_path), 0, 4)
    assert rows(tmp_path) == ROWS


def test_a_table_is_whole_after_two_kills_one_of_them_in_the_middle_of_a_line(tmp_path: Path) -> None:
    train(loggers(tmp_path), 0, 2)
    both = loggers(tmp_path)
    resume(tmp_path, both[1:], 1)
    train(both, 2, 4)
    for name in ("metrics.csv", "metrics.jsonl"):
        with (tmp_path / name).open("r+", encoding="utf-8") as file:
            content = file.read()
            file.truncate(len(content) - 9)
    both = loggers(tmp_path)
    resume(tmp_path, both[1:], 2)
    assert rows(tmp_path) == [{k: v for k, v in row.items() if k != "guard/c"} for row in ROWS[:3]]
    train(both, 3, 4)
    assert rows(tmp_path) == ROWS


def test_a_table_is_that_of_the_kept_lines_if_nothing_remains_to_be_trained(tmp_path: Path) -> None:
    train(loggers(tmp_path), 0, 4)
    (tmp_path / "metrics.csv").write_text("step,ppo/b\n4,4.0\n")  # as earlier versions left it
    resume(tmp_path, [MetricsTable(str(tmp_path))], 4)
    assert rows(tmp_path) == ROWS


def test_a_table_is_empty_again_if_the_run_begins_anew(tmp_path: Path) -> None:
    train(loggers(tmp_path), 0, 2)
    both = loggers(tmp_path)
    resume(tmp_path, both[1:], -1)
    assert rows(tmp_path) == []
    train(both, 0, 4)
    assert rows(tmp_path) == ROWS


@pytest.mark.parametrize("evaluated", [True, False])
def test_tensorboard_shows_every_step_once(tmp_path: Path, evaluated: bool) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from rlhf.tracking.tensorboard import TensorBoard

    def both() -> list[Any]:
        return [JsonLines(tmp_path), TensorBoard(tmp_path, name=None, version="tensorboard")]

    killed = both()
    train(killed, 0, 3)  # and left without closing a file
    after = both()
    resume(tmp_path, after[1:], 2, evaluated)
    if not evaluated:
        for logger in after:
            logger.log_metrics({"eval/a": 0.25, "time/evaluate": 1.0}, 2)
    train(after, 3, 4)
    shown = loading.EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    for name in ("ppo/b", "eval/a"):
        expected = [(int(row["step"]), float(row[name])) for row in ROWS if row[name]]
        assert [(event.step, event.value) for event in shown.Scalars(name)] == expected
    assert [event.step for event in shown.Scalars("guard/c")] == [3]
