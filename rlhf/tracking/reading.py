"""Reading what runs left, which may be damaged: what cannot be used is named with its file, and the rest is read."""

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rlhf.files import read_lines

log = logging.getLogger(__name__)
ADJUSTED, CONTROLLED = "eval/length_adjusted_win_rate", "eval/length_controlled_win_rate"


def try_object(path: Path) -> tuple[dict[str, Any], str]:
    """(content, "") of a JSON file; ({}, "") where there is none, and ({}, what is wrong) where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, ""
    except (ValueError, RecursionError, OSError) as error:  # a UnicodeDecodeError is a ValueError
        return {}, f"{path.name} cannot be read ({error})"
    if not isinstance(content, dict):
        return {}, f"{path.name} holds {type(content).__name__} where an object is expected"
    return content, ""


def read_summary(path: Path) -> tuple[dict[str, Any], str]:
    """(summary, "") with today's names of metrics, or ({}, what is wrong) as `try_object`."""
    summary, fault = try_object(path)
    shapes = {"metrics": dict, "sft_metrics": dict, "config": dict, "guards": dict, "versions": dict, "overrides": list}
    for key, shape in shapes.items():
        if summary.get(key) is not None and not isinstance(summary[key], shape):
            return {}, f"{path.name}: {key} is {summary[key]!r:.40}"
    for key in ("metrics", "sft_metrics"):
        values = summary.get(key) or {}
        wrong = [name for name, value in values.items() if name.startswith("eval/") and not is_number(value)]
        if wrong:
            return {}, f"{path.name}: {wrong[0]} is {values[wrong[0]]!r:.40}"
        if values:
            summary[key] = renamed(values)
    for key in ("wall_seconds", "peak_memory_bytes"):
        if not is_number(summary.get(key) or 0):
            return {}, f"{path.name}: {key} is {summary[key]!r:.40}"
    return summary, fault


def read_plan(path: Path) -> tuple[list[dict[str, Any]], str]:
    """(the intended runs of a sweep, "") or ([], what is wrong) as `try_object`."""
    plan, fault = try_object(path)
    runs = plan.get("runs")
    if fault or (runs is None and not path.exists()):
        return [], fault
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "folder" in run for run in runs):
        return [], f"{path.name} names no runs"
    return runs, ""


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics by today's names: what earlier runs called length-controlled is the length-adjusted rate."""
    if CONTROLLED not in metrics or ADJUSTED in metrics:
        return dict(metrics)
    return {ADJUSTED if key == CONTROLLED else key: value for key, value in metrics.items()}


def stepped_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file that have a step (None: not PPO's); the others are counted and said."""
    lines = read_lines(path)
    kept = [line for line in lines if isinstance(line, dict) and "step" in line and _is_step(line["step"])]
    if len(kept) < len(lines):
        log.warning("%s: %d lines have no step and are left out", path, len(lines) - len(kept))
    return kept


def numbers_only(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `outcomes.jsonl` without what are no lists of numbers."""
    return {key: value for key, value in line.items() if key == "step" or _is_numbers(value)}


def printable(stream: TextIO) -> None:
    """Print "?" for what a terminal's encoding lacks, where "±" would end the command."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _is_step(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def is_number(value: Any) -> bool:
    """Whether it is a number, or null for one that is not known."""
    return value is None or isinstance(value, int | float)


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(is_number(value) for value in values)
