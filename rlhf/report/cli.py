"""The `rlhf-report` command, and `make_report`, which does the same at the end of a sweep."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from rlhf.errors import MISTAKE, FigureError, NoRunsError
from rlhf.files import write_json
from rlhf.report import checks, page
from rlhf.report.column_differences import column_differences
from rlhf.report.column_table import column_table
from rlhf.report.comparisons import Comparison, baseline, compared_metrics, comparisons, difference_table, origins
from rlhf.report.equal_distance import common_distances, compared_at, distance_difference_table, distance_table
from rlhf.report.evaluation_shown import evaluation_shown
from rlhf.report.figures import make_figures
from rlhf.report.findings import findings
from rlhf.report.pareto_front import front_table
from rlhf.report.results import main_table
from rlhf.report.runs import Sweep, load
from rlhf.report.tables import Table
from rlhf.report.terminal import drawn
from rlhf.report.tuning import tuning_table
from rlhf.report.variance_table import variance_table
from rlhf.tracking.reading import printable, try_object

MADE = ".made.json"  # in a report's folder: the files of its tables and figures


class Headed(NamedTuple):
    """A table under its heading."""

    heading: str
    table: Table


class Made(NamedTuple):
    """A report: its page, its tables by the names of their files, the sentences of what was found, and warnings."""

    page: Path
    tables: dict[str, Table]
    sentences: list[str]
    warnings: list[str]


def make_report(folders: Sequence[Path], out: Path | None = None, evaluation: str | None = None) -> Path:
    """Write tables, figures and `report.html`, and return the path of the page.

    Args:
        folders: one or more sweeps, reported on together.
        out: where to write; by default `report/` in the first folder.
        evaluation: the digest of the evaluation to show, or `training`; by default the one that was asked for last.

    Raises:
        NoRunsError: a folder has no finished run.
        FigureError: the layout asks for a figure that cannot be drawn, or for a choice by an incomplete rule.
    """
    return _make(folders, out, evaluation).page


def main(arguments: Sequence[str] | None = None) -> None:
    """`rlhf-report FOLDER… [--out DIR] [--evaluation DIGEST]`."""
    parser = argparse.ArgumentParser(prog="rlhf-report", description="Tables, figures and a page from a sweep's runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, such as outputs/table1")
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER/report)")
    parser.add_argument(
        "--evaluation",
        metavar="DIGEST",
        help="a folder in the runs' evaluations/, or `training` for what was measured during the training (default: "
        "the one that a command asked for last)",
    )
    options = parser.parse_args(arguments)
    printable(sys.stdout)
    printable(sys.stderr)
    try:
        show_report(options.folders, options.out, options.evaluation)
    except (NoRunsError, FigureError) as error:
        print(f"rlhf-report: {error}", file=sys.stderr)
        raise SystemExit(MISTAKE) from None


def show_report(folders: Sequence[Path], out: Path | None = None, evaluation: str | None = None) -> Path:
    """`make_report`, and on the terminal its main tables, its sentences, its warnings and where the page is."""
    path, tables, sentences, warnings = _make(folders, out, evaluation)
    console = Console()
    for name, table in tables.items():
        if name in ("table", "front", "tuning"):
            console.print(drawn(table, console.width))
        if name == "front":
            console.print(table.caption)
    for sentence in sentences:
        console.print(_bullet(sentence))
    for sentence in warnings:
        console.print(_bullet(sentence, "!"), style="yellow")
    console.print(str(path), soft_wrap=True, highlight=False)
    return path


def _bullet(sentence: str, mark: str = "•") -> RichTable:
    """A sentence behind a bullet, below which its further lines do not begin."""
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    grid.add_row(mark, Text(sentence))
    return grid


def _make(folders: Sequence[Path], out: Path | None, evaluation: str | None) -> Made:
    """`make_report`, which also returns what the command prints."""
    # 1. Read the runs and compare them. A search has too many rows to compare: it gets its front instead.
    sweep = load(folders, evaluation)
    out = out or folders[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    metrics, front = compared_metrics(sweep), front_table(sweep)
    compared = [] if front else [item for row in origins(sweep) for item in comparisons(sweep, row, metrics)]
    distances = [] if front else common_distances(sweep)
    at_distance = compared_at(sweep, baseline(sweep), metrics, distances)
    # 2. Write the tables, each in three formats.
    tables = {"table": Headed("Results", main_table(sweep))}
    if front:
        tables["front"] = Headed("The front of the search", front)
    elif compared:
        tables |= _differences(sweep, compared) | _at_distance(sweep, distances, at_distance)
    if chosen := tuning_table(sweep):
        tables["tuning"] = Headed("Chosen by the rule", chosen)
    if not front and (variances := variance_table(sweep)):
        tables["variance"] = Headed("Where the spread comes from", variances)
    tables = {name: Headed(heading, table.without_empty()) for name, (heading, table) in tables.items()}
    for name, (_, table) in tables.items():
        for suffix, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
            (out / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    # 3. Draw the figures, and write the page that holds all of it.
    figures = make_figures(sweep, out / "figures")
    told = findings(sweep, compared, metrics[0] if metrics else None, at_distance)
    sentences = [*told, *evaluation_shown(sweep.finished)]
    path = out / "report.html"
    path.write_text(page.render(sweep, sentences, list(tables.values()), figures, out / "figures"), encoding="utf-8")
    # 4. What only an earlier report had must not lie beside it: it would be taken for a part of this one.
    drawn = [f"figures/{figure['name']}.{suffix}" for figure in figures for suffix in ("png", "svg", "csv")]
    _remove_stale(out, [*(f"{name}.{suffix}" for name in tables for suffix in ("md", "csv", "tex")), *drawn])
    return Made(path, {name: table for name, (_, table) in tables.items()}, sentences, checks.warnings(sweep))


def _remove_stale(out: Path, made: list[str]) -> None:
    """Remove tables and figures that an earlier report has made in `out` and this one has not; note its own files."""
    for name in set(try_object(out / MADE)[0].get("files", [])) - set(made):
        (out / name).unlink(missing_ok=True)
    write_json(out / MADE, {"files": made})


def _differences(sweep: Sweep, compared: Sequence[Comparison]) -> dict[str, Headed]:
    """The differences from SFT, and those from the baseline if the layout names one."""
    tables = {}
    for against in origins(sweep):
        found = [item for item in compared if item.other is against]
        name = "gains" if against is sweep.rows[0] else "differences"
        if found:
            tables[name] = Headed(f"Differences from “{against.label}”", difference_table(sweep, found, against))
        every = column_differences(sweep, against)
        if len({item.metric for item in every}) > len({item.metric for item in found}):
            heading = f"Differences from “{against.label}” in every column"
            tables[f"{name}_by_column"] = Headed(heading, column_table(sweep, every, against))
    return tables


def _at_distance(sweep: Sweep, distances: Sequence[float], found: dict[float, list[Comparison]]) -> dict[str, Headed]:
    """Rows and differences from the baseline at equal distance, if rows have one in common."""
    tables, against = {}, baseline(sweep)
    if distances:
        tables["distance"] = Headed("At equal distance from SFT", distance_table(sweep, distances))
    if any(found.values()):
        table = distance_difference_table(sweep, found, against)
        tables["distance_differences"] = Headed(f"Differences from “{against.label}” at equal distance", table)
    return tables
