"""`rlhf-status FOLDER`: how far a sweep is, on the terminal."""

import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.sweep.plan import PLAN, jobs_of
from rlhf.sweep.states import State, counts, queue, states
from rlhf.tracking.reading import printable, read_plan


def view(folder: Path, runs: list[State]) -> Group:
    """A sweep on the terminal: a bar, a line, and what failed or is under way."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for run in runs:
        if run.state in ("running", "begun", "failed") or run.reason:
            left = f"{timedelta(seconds=round(run.left))} left" if run.left is not None else ""
            colour = "red" if run.state == "failed" else "cyan"
            table.add_row(Text(run.state, colour), run.folder.name, f"step {run.step}", run.node, left, run.reason)
    done = sum(run.state == "done" for run in runs)
    return Group(
        Text(str(folder), style="bold"),
        ProgressBar(len(runs), done, width=60),
        counts(runs, jobs_of(folder / PLAN)),
        table,
    )


def status() -> None:
    """`rlhf-status FOLDER [--watch]`: how far a sweep is."""
    import argparse

    from rlhf.errors.explaining import one_sentence_errors

    parser = argparse.ArgumentParser(prog="rlhf-status", description="How far a sweep is.")
    parser.add_argument("folder", type=Path, help="the sweep's folder, such as outputs/table1")
    parser.add_argument("--watch", action="store_true", help="stay and refresh every five seconds")
    arguments = parser.parse_args()
    if not (arguments.folder / PLAN).exists():
        parser.exit(2, f"rlhf-status: {arguments.folder} holds no {PLAN}: it is not the folder of a sweep\n")
    _, fault = read_plan(arguments.folder / PLAN)
    if fault:
        parser.exit(2, f"rlhf-status: {arguments.folder}: {fault}\n")
    printable(sys.stdout)
    with one_sentence_errors(parser.prog):
        _show(arguments.folder, arguments.watch)


def _show(folder: Path, watch: bool) -> None:
    from rich.live import Live

    console = Console()
    if not watch:
        console.print(view(folder, states(folder, queue(folder))))
        return
    with Live(console=console, refresh_per_second=1) as live:
        while True:
            runs = states(folder, queue(folder))
            live.update(view(folder, runs))
            if all(run.state in ("done", "failed") for run in runs):
                return
            time.sleep(5)
