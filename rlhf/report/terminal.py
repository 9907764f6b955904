"""Results on the terminal: those of a run, tables of a report or a comparison, and in a dry run what would be done."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from rlhf.policy_settings import METHODS
from rlhf.report.tables import Table

# Metric → its label, and the factor that it is shown with.
ROWS = {
    "eval/win_rate": ("win rate against the reference (%)", 100),
    "eval/win_rate_se": ("  its standard error", 100),
    "eval/length_adjusted_win_rate": ("  length-adjusted (%)", 100),
    "eval/length_adjusted_win_rate_se": ("  its standard error", 100),
    "eval/length_controlled_win_rate": ("  length-controlled (%)", 100),
    "eval/length_controlled_win_rate_se": ("  its standard error", 100),
    "eval/reward": ("reward", 1),
    "eval/gold_utility": ("gold utility", 1),
    "eval/true_kl": ("true KL from SFT (nats per token)", 1),
    "eval/response_tokens": ("response length (tokens)", 1),
    "eval/factual_precision": ("factual precision (%)", 100),
    "eval/facts_per_response": ("facts per response", 1),
    "eval/factscore": ("FActScore (%)", 100),
    "eval/responding_ratio": ("responses that do not abstain (%)", 100),
}
NARROW = 20  # characters that a column of words keeps where a table is too wide
TITLES = {"ppo": "PPO", "dpo": "DPO", "sft": "SFT", "reward": "reward model", "evaluate": "measured"}


def show_plan(description: Mapping[str, Any], overrides: Sequence[str], sweeping: bool) -> None:
    """Print what a job would do (`rlhf.pipeline.preflight.describe`): all that is to be said, or in a sweep a line."""
    if not sweeping:
        said = {key: value for key, value in description.items() if value not in (None, [], {}, {"data": []})}
        print(OmegaConf.to_yaml(said), end="")
        return
    step = description["step"]
    state = "done" if description["done"] else f"step {step}" if step else "missing"
    if description.get("measures"):
        state = "measure"
    if description.get("waits_for"):
        state = "waits"
    memory = "" if description["done"] else (description["memory"] or "").partition(" (")[0]
    same = f"(= {description['same_as']})" if description["same_as"] else ""
    print("  ".join(filter(None, [f"{state:<7}", " ".join(overrides), memory, same])))
    for more in ("moves_aside", "waits_for"):
        if description.get(more):
            print(f"{'':<7}  {description[more]}")


def show_results(summary: dict[str, Any], folder: Path) -> None:
    """Print the metrics of a finished run; those of a policy beside those of the SFT model that it started from."""
    console = Console()
    metrics, before = summary["metrics"], summary.get("sft_metrics") or {}
    table = RichTable(
        title=f"{TITLES.get(summary['stage'], summary['stage'])} in {spent(summary)}", title_justify="left"
    )
    table.add_column("")
    if summary["stage"] in (*METHODS, "evaluate"):
        columns = {"SFT": before, summary["stage"].upper() if summary["stage"] in METHODS else "PPO": metrics}
        if summary["stage"] == "evaluate" and (outside := _outside(summary)):
            columns = {outside: metrics}
        for name in columns:
            table.add_column(name, justify="right")
        for key, (label, scale) in ROWS.items():
            if key in metrics:
                table.add_row(label, *(f"{row[key] * scale:.2f}" if key in row else "" for row in columns.values()))
    else:
        table.add_column(summary["stage"], justify="right")
        for key, value in metrics.items():
            table.add_row(key, f"{value:.4f}")
    console.print(table)
    method = summary["stage"] if summary["stage"] in METHODS else "ppo"
    if plateau := summary.get("plateau"):
        console.print(f"ended at step {plateau['step']} of {summary['config'][method]['steps']}: {plateau['reason']}")
    # 2. Where it is, and what can be done with it: lines to copy, which no wrapping breaks.
    place = run = from_here(folder)
    if summary["stage"] == "evaluate" and (measured := summary.get("same_as")):
        # the results lie beside the run that was measured, whose report shows them
        place = from_here((folder / measured).resolve())
        run = place.parent.parent
    for line in (str(place), *next_commands(summary["stage"], run)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def from_here(folder: Path) -> Path:
    """The folder as a command from the current one names it."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def next_commands(stage: str, folder: Path) -> list[str]:
    """What to type after a run of a stage: the report of a policy, and a chat with any model that answers."""
    name = shlex.quote(str(folder))
    report = [f"rlhf-report {name}"] if stage in (*METHODS, "evaluate") else []
    return [f"  {line}" for line in [*report, *([f"rlhf-chat {name}"] if stage in (*METHODS, "sft") else [])]]


def spent(summary: dict[str, Any]) -> str:
    """How long a run has taken, in seconds, or from two minutes on in minutes."""
    seconds = summary["wall_seconds"]
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _outside(summary: dict[str, Any]) -> str | None:
    """What was measured if it is no run of PPO: a policy from elsewhere, or the SFT model (policy=null)."""
    return summary.get("policy") or (None if summary["config"].get("policy") else "SFT")


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables with their captions: drawn on a terminal, elsewhere in Markdown, to be kept in a file."""
    if not sys.stdout.isatty():
        print("\n".join(table.markdown() for table in tables))
        return
    console = Console()
    for table in tables:
        console.print(drawn(table, console.width))
        console.print(table.caption, "", sep="\n", markup=False, highlight=False)


def drawn(table: Table, width: int) -> RichTable:
    """A table for the terminal, with as many of its columns as fit without a line break inside a number.

    The widest column of words is made narrower, down to `NARROW` characters, before a column is left out.
    """
    texts, titles, numeric = table.texts(), table.titles(), table.numeric()
    # a column is as wide as its longest cell, or the longest word of its header; borders and padding take 3 more
    sizes = [max(map(len, [*name.split(), *cells])) for name, *cells in zip(titles, *texts, strict=True)]
    words = max((i for i, number in enumerate(numeric) if not number), key=sizes.__getitem__, default=0)
    excess = 1 + sum(size + 3 for size in sizes) - width
    if excess > 0:
        sizes[words] = max(min(sizes[words], NARROW), sizes[words] - excess)
    fitting = sum(used <= width for used in accumulate((size + 3 for size in sizes), initial=1)) - 1
    left_out, footnote = ", ".join(table.header[fitting:]), re.search("† [^.]+[.]", table.caption)
    notes = [f"Columns that do not fit: {left_out}."] if left_out else []
    if footnote and any("†" in cell for row in texts for cell in row[:fitting]):
        notes.append(footnote[0])
    shown = RichTable(caption="\n".join(notes) or None, caption_justify="left")
    for name, right, size in zip(titles[:fitting], numeric, sizes, strict=False):
        shown.add_column(name, justify="right" if right else "left", width=size, overflow="fold")
    for row, marks in zip(texts, table.best(), strict=True):
        cells = (Text(text, "bold" if best else "") for text, best in zip(row, marks, strict=True))
        shown.add_row(*list(cells)[:fitting])
    return shown
