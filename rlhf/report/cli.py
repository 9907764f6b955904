"""The `rlhf-report` command, and the same as a function for the end of a sweep."""

import argparse
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from rlhf.report import page, words
from rlhf.report.figures import FigureError, make_figures
from rlhf.report.results import baseline, compared, comparisons, difference_table, main_table
from rlhf.report.runs import NoRunsError, load
from rlhf.report.tables import Table


def make_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write tables, figures and `report.html` into `out` (default: the first folder's `report/`); returns the page."""
    return _make(folders, out)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """`rlhf-report FOLDER… [--out DIR]`."""
    parser = argparse.ArgumentParser(prog="rlhf-report", description="Tables, figures and a page from a sweep's runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, such as outputs/table1")
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER/report)")
    options = parser.parse_args(arguments)
    try:
        path, table = _make(options.folders, options.out)
    except (NoRunsError, FigureError) as error:
        print(f"rlhf-report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    console = Console()
    console.print(_on_terminal(table, console.width))
    console.print(str(path), soft_wrap=True, highlight=False)


def _make(folders: Sequence[Path], out: Path | None) -> tuple[Path, Table]:
    sweep = load(folders)
    out = out or folders[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    against, metrics = baseline(sweep), compared(sweep)
    found = comparisons(sweep, against, metrics)
    tables = [("Results", main_table(sweep))]
    if found:
        tables.append((f"Differences from “{against.label}”", difference_table(sweep, found, against)))
    for name, (_, table) in zip(("table", "differences"), tables, strict=False):
        for suffix, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            (out / f"{name}.{suffix}").write_text(text)
    drawn = make_figures(sweep, out / "figures")
    said = words.summary(sweep, found, metrics[0] if metrics else None)
    path = out / "report.html"
    path.write_text(page.render(sweep, said, tables, drawn, out / "figures"))
    return path, tables[0][1]


def _on_terminal(table: Table, width: int) -> RichTable:
    """As many columns as fit without breaking a number."""
    texts = table.texts()
    longest = [max(map(len, [*name.split(), *cells])) for name, *cells in zip(table.header, *texts, strict=True)]
    fitting = sum(used <= width for used in accumulate((size + 3 for size in longest), initial=1)) - 1
    left_out = ", ".join(table.header[fitting:])
    shown = RichTable(caption=f"Not shown for want of room: {left_out}." if left_out else None, caption_justify="left")
    for name, right, size in zip(table.header[:fitting], table.numeric(), longest, strict=False):
        shown.add_column(name, justify="right" if right else "left", width=size)
    for row in texts:
        shown.add_row(*row[:fitting])
    return shown
