"""Tolerant readers for the files of past runs, which may be damaged or written by an earlier version.

Nothing here raises because of a file's content: the `try_…` functions return an empty value together with a sentence
that says what is wrong. Keys, classes and metrics that were renamed since are returned under their present names.
"""

import io
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rlhf.errors.keys import present_name
from rlhf.files import read_lines

log = logging.getLogger(__name__)
ADJUSTED, CONTROLLED = "eval/length_adjusted_win_rate", "eval/length_controlled_win_rate"

# Earlier path of a class or function that a configuration names by `_target_` → present path.
RENAMED_TARGETS = {
    "rlhf.distributed.collectives.DataParallel": "rlhf.distributed.strategies.DataParallel",
    "rlhf.distributed.collectives.Sharded": "rlhf.distributed.strategies.Sharded",
    "rlhf.finished_judge.FinishedRewardModelJudge": "rlhf.finished.judge.FinishedRewardModelJudge",
    "rlhf.parallel.DataParallel": "rlhf.distributed.strategies.DataParallel",
    "rlhf.parallel.Sharded": "rlhf.distributed.strategies.Sharded",
    "rlhf.scorers.bag_of_words.BagOfWordsScorer": "rlhf.scorers.ngrams.NgramScorer",
    "rlhf.scorers.sentiment.ClassifierScorer": "rlhf.scorers.classifier.ClassifierScorer",
    "rlhf.scorers.sentiment.SentimentScorer": "rlhf.scorers.classifier.ClassifierScorer",
    "rlhf.tracking.run_log.wandb_logger": "rlhf.tracking.dashboards.wandb_logger",
    "rlhf.tracking.wandb_logger": "rlhf.tracking.dashboards.wandb_logger",
}


def try_object(path: Path) -> tuple[dict[str, Any], str]:
    """Read a JSON object: (content, ""), ({}, "") if the file does not exist, or ({}, what is wrong with it)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except (ValueError, RecursionError, OSError) as error:  # a UnicodeDecodeError is a ValueError
        return {}, f"{path.name} cannot be read ({error})"
    if not isinstance(content, dict):
        return {}, f"{path.name} holds {type(content).__name__} where an object is expected"
    return content, ""


def try_summary(path: Path) -> tuple[dict[str, Any], str]:
    """Read a `summary.json` like `try_object`; its configuration, overrides and metrics have their present names."""
    summary, fault = try_object(path)
    # 1. Reject values that later code could not work with.
    shapes = {"metrics": dict, "sft_metrics": dict, "config": dict, "guards": dict, "versions": dict, "overrides": list,
              "sessions": list}  # fmt: skip
    for key, shape in shapes.items():
        if summary.get(key) is not None and not isinstance(summary[key], shape):
            return {}, f"{path.name}: {key} is {summary[key]!r:.40}"
    for key in ("metrics", "sft_metrics"):
        values = summary.get(key) or {}
        wrong = [name for name, value in values.items() if name.startswith("eval/") and not _is_number(value)]
        if wrong:
            return {}, f"{path.name}: {wrong[0]} is {values[wrong[0]]!r:.40}"
    for key in ("wall_seconds", "peak_memory_bytes"):
        if not _is_number(summary.get(key) or 0):
            return {}, f"{path.name}: {key} is {summary[key]!r:.40}"
    # 2. Translate names of an earlier version.
    translations = [("metrics", renamed_metrics), ("sft_metrics", renamed_metrics)]
    for key, translate in (*translations, ("config", renamed_config), ("overrides", renamed_overrides)):
        if summary.get(key):
            summary[key] = translate(summary[key])
    return summary, fault


def try_plan(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Read the intended runs from a sweep's `plan.json`: (runs, "") or ([], what is wrong), like `try_object`."""
    plan, fault = try_object(path)
    runs = plan.get("runs")
    if fault or (runs is None and not path.exists()):
        return [], fault
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "folder" in run for run in runs):
        return [], f"{path.name} names no runs"
    return [{**run, "overrides": renamed_overrides(run.get("overrides") or ())} for run in runs], ""


def renamed_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics under their present names: earlier versions called the length-adjusted win rate length-controlled."""
    if CONTROLLED not in metrics or ADJUSTED in metrics:
        return dict(metrics)
    return {ADJUSTED if key == CONTROLLED else key: value for key, value in metrics.items()}


def renamed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration with the present names of keys (`rlhf.errors.keys`) and classes (`RENAMED_TARGETS`).

    Values are unchanged. The names of rows in the report's layout are overrides, so they are translated, too.
    """
    found = _renamed_mapping(config, "")
    if isinstance(layout := found.get("report"), dict):
        found["report"] = _renamed_layout(layout)
    return found


def renamed_overrides(overrides: Iterable[Any]) -> list[str]:
    """Hydra overrides (`key=value`, perhaps with `+` or `~` before the key) with the present names of their keys."""
    return [_renamed_override(str(override)) for override in overrides]


def _renamed_mapping(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The node of a configuration whose keys have the dotted path `prefix` before them."""
    return {_renamed_name(key, prefix): _renamed_value(key, value, prefix) for key, value in config.items()}


def _renamed_value(key: str, value: Any, prefix: str) -> Any:
    if isinstance(value, Mapping):
        return _renamed_mapping(value, f"{prefix}{key}.")
    if isinstance(value, list):
        return [_renamed_value(key, item, prefix) for item in value]
    return RENAMED_TARGETS.get(value, value) if key == "_target_" and isinstance(value, str) else value


def _renamed_name(key: str, prefix: str) -> str:
    """The present name of the last part of a dotted key."""
    present = present_name(f"{prefix}{key}")
    return present.rpartition(".")[2] if present else key


def _renamed_override(override: str) -> str:
    """One override with its present key; a text that is no override stays as it is unless it is a renamed key."""
    marked, equals, value = override.partition("=")
    path = marked.lstrip("+~")
    parent, dot, name = path.rpartition(".")
    value = RENAMED_TARGETS.get(value, value) if name == "_target_" else value
    return f"{marked[: -len(path) or None]}{parent}{dot}{_renamed_name(name, parent + dot)}{equals}{value}"


def _renamed_layout(layout: dict[str, Any]) -> dict[str, Any]:
    """A report's layout whose `labels`, `baseline` and figures' `rows` name rows by the present overrides."""

    def renamed_row(name: Any) -> Any:
        return ", ".join(map(_renamed_override, name.split(", "))) if isinstance(name, str) else name

    found = {**layout, "baseline": renamed_row(layout["baseline"])} if "baseline" in layout else dict(layout)
    if isinstance(labels := layout.get("labels"), dict):
        found["labels"] = {renamed_row(name): label for name, label in labels.items()}
    if isinstance(figures := layout.get("figures"), list):
        found["figures"] = [
            {**figure, "rows": list(map(renamed_row, figure["rows"]))}
            if isinstance(figure, dict) and isinstance(figure.get("rows"), list)
            else figure
            for figure in figures
        ]
    return found


def stepped_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file whose `step` is a whole number, or null for stages other than PPO.

    The number of lines left out is logged as a warning.
    """
    lines = read_lines(path)
    kept = [line for line in lines if isinstance(line, dict) and "step" in line and _is_step(line["step"])]
    if len(kept) < len(lines):
        log.warning("%s: %d lines have no step and are left out", path, len(lines) - len(kept))
    return kept


def numbers_only(line: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a line of `outcomes.jsonl` that are lists of numbers, and its step."""
    return {key: value for key, value in line.items() if key == "step" or _is_numbers(value)}


def printable(stream: TextIO) -> None:
    """Make a stream print "?" for characters that its encoding lacks, where "±" would otherwise raise an exception."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or null, which stands for an unknown number."""
    return value is None or isinstance(value, int | float)


def _is_step(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(_is_number(value) for value in values)
