"""The `rlhf-status` command: how far a sweep is, on the terminal."""

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.errors import MISTAKE
from rlhf.errors.explaining import one_sentence_errors
from rlhf.files import PLAN
from rlhf.sweep.plan import planned_parallelism
from rlhf.sweep.states import RunState, earlier_states, names, progress_line, states, sweep_queue
from rlhf.tracking.reading import printable, try_plan

REFRESH_SECONDS = 5  # of --watch
COLOURS = {"failed": "red", "running": "cyan"}
MEASURED = ("reward", "loss", "win %", "KL")  # columns, where a run has them
DECIMALS = {"win %": 1}


def status() -> None:
    """`rlhf-status FOLDER [--watch]`."""
    parser = argparse.ArgumentParser(prog="rlhf-status", description="How far a sweep is.")
    parser.add_argument("folder", type=Path, help="the sweep's folder, such as outputs/table1")
    parser.add_argument("--watch", action="store_true", help="stay and refresh every five seconds")
    arguments = parser.parse_args()
    if not (arguments.folder / PLAN).exists():
        parser.exit(MISTAKE, f"rlhf-status: {arguments.folder} holds no {PLAN}: it is not the folder of a sweep\n")
    _, fault = try_plan(arguments.folder / PLAN)
    if fault:
        parser.exit(MISTAKE, f"rlhf-status: {arguments.folder}: {fault}\n")
    printable(sys.stdout)
    with one_sentence_errors(parser.prog):
        _show(arguments.folder, arguments.watch)


def _show(folder: Path, watch: bool) -> None:
    """Print the view once, or until no run can change any more."""
    console = Console()
    if not watch:
        console.print(view(folder, states(folder, sweep_queue(folder))))
        return
    with Live(console=console, refresh_per_second=1) as live:
        while True:
            runs = states(folder, sweep_queue(folder))
            live.update(view(folder, runs))
            if all(run.state in ("done", "failed") for run in runs):
                return
            time.sleep(REFRESH_SECONDS)


def view(folder: Path, runs: list[RunState], height: int | None = None) -> Group:
    """A progress bar, a line of counts, and a row for each run that is under way, has failed or waits in a queue.

    With `height`, as many rows as a terminal of so many lines has place for, those that run first, and no reasons of
    failures.
    """
    rows = [run for run in runs if run.state in ("running", "begun", "failed") or run.reason]
    rows.sort(key=lambda run: ("running", "failed").index(run.state) if run.state in ("running", "failed") else 2)
    room = len(rows) if height is None else max(1, height - 5)  # beside the lines above and below the rows
    left_out = [Text(f"… and {len(rows) - room} more", "dim")] if len(rows) > room else []
    failed = [run for run in rows if run.state == "failed" and height is None]
    done = sum(run.state == "done" for run in runs)
    return Group(
        Text(str(folder), style="bold", overflow="fold"),
        Padding(ProgressBar(len(runs), done, width=60), 0),  # which ends its line
        progress_line(runs, planned_parallelism(folder / PLAN)),
        *_of_earlier_sweeps(folder),
        *([_table(rows[:room], names(runs))] if rows else []),
        *left_out,
        *(Text(f"{names(runs)[run.folder]}: {run.reason} ({run.folder.name})", "red") for run in failed),
    )


def _of_earlier_sweeps(folder: Path) -> list[Text]:
    """A line that counts the runs of other sweeps in the same folder, if there are any."""
    earlier = earlier_states(folder)
    return [Text(f"of earlier sweeps in this folder: {progress_line(earlier, 1).partition(';')[0]}", "dim")] * bool(
        earlier
    )


def _table(rows: list[RunState], called: dict[Path, str]) -> Table:
    """A line for each run: its state, what tells it from the others, and where it is, or why it is not under way."""
    measured = [name for name in MEASURED if any(name in run.metrics for run in rows)]
    timed, placed = any(run.left is not None for run in rows), any(run.node for run in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("")
    table.add_column("run", max_width=60)  # the only one that gives way
    table.add_column("at", no_wrap=True)
    for name in [*measured, *(["left"] if timed else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    if placed:
        table.add_column("node", no_wrap=True)
    for run in rows:
        cells = [f"{run.metrics[name]:.{DECIMALS.get(name, 2)}f}" if name in run.metrics else "" for name in measured]
        cells += [str(timedelta(seconds=round(run.left))) if run.left is not None else ""] if timed else []
        at = run.doing or (run.reason if run.state == "waiting" else f"step {run.step}")
        label = Text(called[run.folder], no_wrap=True, overflow="ellipsis")
        table.add_row(Text(run.state, COLOURS.get(run.state, "")), label, at, *cells, *([run.node] if placed else []))
    return table
