"""The `rlhf-status` command: how far a sweep is, on the terminal."""

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.errors import MISTAKE
from rlhf.errors.explaining import one_sentence_errors
from rlhf.files import PLAN
from rlhf.sweep.plan import planned_parallelism
from rlhf.sweep.states import RunState, names, progress_line, states, sweep_queue
from rlhf.tracking.reading import printable, try_plan

REFRESH_SECONDS = 5  # of --watch


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


def view(folder: Path, runs: list[RunState]) -> Group:
    """A progress bar, a line of counts, and a row for each run that is under way, has failed or waits in a queue."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    called = names(runs)
    for run in runs:
        if run.state in ("running", "begun", "failed") or run.reason:
            left = f"{timedelta(seconds=round(run.left))} left" if run.left is not None else ""
            colour = "red" if run.state == "failed" else "cyan"
            reason = f"{run.reason} ({run.folder.name})" if run.state == "failed" else run.reason
            table.add_row(Text(run.state, colour), called[run.folder], f"step {run.step}", run.node, left, reason)
    done = sum(run.state == "done" for run in runs)
    return Group(
        Text(str(folder), style="bold"),
        ProgressBar(len(runs), done, width=60),
        progress_line(runs, planned_parallelism(folder / PLAN)),
        table,
    )
