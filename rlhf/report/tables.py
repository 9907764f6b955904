"""A table that can be written as Markdown, CSV and LaTeX."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

NOTHING = "–"  # an empty cell
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$", "√": r"$\surd$",
        "†": r"$\dagger$", "≥": r"$\geq$", "β": r"$\beta$", "α": r"$\alpha$",
        "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A value, perhaps with its standard error: rounded to `digits` decimals as text, unrounded in CSV."""

    value: float
    error: float | None = None
    digits: int = 1
    signed: bool = False

    def __str__(self) -> str:
        if math.isnan(self.value):
            return NOTHING
        sign = "+" if self.signed and self.value > 0 else ""
        text = f"{sign}{self.value:.{self.digits}f}".replace("-", "−")
        if self.error is None or math.isnan(self.error):
            return text
        return f"{text} ± {self.error:.{self.digits}f}"


@dataclass(frozen=True)
class Interval:
    """An interval by its two ends; `mark` is appended to its text, as a reference to a footnote."""

    low: float
    high: float
    digits: int = 1
    mark: str = ""
    signed: bool = True

    def __str__(self) -> str:
        low, high = (str(Number(end, digits=self.digits, signed=self.signed)) for end in (self.low, self.high))
        return f"{low} to {high}{self.mark}"


@dataclass(frozen=True)
class WithInterval:
    """A value with the two ends of its interval in brackets; `mark` refers to a footnote."""

    value: float
    low: float
    high: float
    digits: int = 1
    mark: str = ""
    signed: bool = False

    def __str__(self) -> str:
        value, ends = Number(self.value, digits=self.digits, signed=self.signed), (self.low, self.high)
        return f"{value} ({Interval(*ends, self.digits, signed=self.signed)}){self.mark}"


Cell = str | int | Number | Interval | WithInterval


@dataclass(frozen=True)
class Table:
    """Header, rows of as many cells, and a caption.

    `better` maps names of the header to "↑" or "↓", which follows the name; the best numbers of such a column are
    marked. CSV has neither.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    better: Mapping[str, str] = field(default_factory=dict)

    def titles(self) -> list[str]:
        """The header with its arrows."""
        return [f"{name} {arrow}" if (arrow := self.better.get(name)) else name for name in self.header]

    def texts(self) -> list[list[str]]:
        """The rows as text, with rounded numbers."""
        return [[str(cell) for cell in row] for row in self.rows]

    def best(self) -> list[list[bool]]:
        """Which cells are the best of their column, as rounded; none where all are alike or no direction is known."""
        found = [[False] * len(self.header) for _ in self.rows]
        for place, arrow in enumerate(map(self.better.get, self.header)):
            cells = [row[place] for row in self.rows]
            known = [cell for cell in cells if isinstance(cell, Number) and math.isfinite(cell.value)]
            values = {round(cell.value, cell.digits) for cell in known}
            if arrow and len(values) > 1:
                wanted = max(values) if arrow == "↑" else min(values)
                for marks, cell in zip(found, cells, strict=True):
                    marks[place] = cell in known and round(cell.value, cell.digits) == wanted
        return found

    def marked(self, start: str, end: str, escape: Mapping[int, str] | None = None) -> list[list[str]]:
        """The rows as text, escaped by a translation table, with the best numbers between two marks."""
        texts = [[cell.translate(escape or {}) for cell in row] for row in self.texts()]
        return [
            [f"{start}{text}{end}" if best else text for text, best in zip(row, marks, strict=True)]
            for row, marks in zip(texts, self.best(), strict=True)
        ]

    def without_empty(self) -> "Table":
        """The same without columns that are empty in every row."""
        kept = [place for place in range(len(self.header)) if {row[place] for row in self.texts()} != {NOTHING}]
        rows = [[row[place] for place in kept] for row in self.rows]
        return replace(self, header=[self.header[place] for place in kept], rows=rows)

    def numeric(self) -> list[bool]:
        """Which columns hold only numbers, apart from empty cells, and are aligned to the right."""
        columns = [[cell for cell in column if cell != NOTHING] for column in zip(*self.rows, strict=True)]
        numeric = [bool(cells) and not any(isinstance(cell, str) for cell in cells) for cells in columns]
        return numeric or [False] * len(self.header)

    def markdown(self) -> str:
        """A table in GitHub's Markdown with the caption below it."""
        rule = ["---:" if right else "---" for right in self.numeric()]
        escaped = [
            [cell.replace("|", r"\|") for cell in row] for row in [self.titles(), rule, *self.marked("**", "**")]
        ]
        lines = ["| " + " | ".join(row) + " |" for row in escaped]
        return "\n".join([*lines, "", self.caption] if self.caption else lines) + "\n"

    def csv(self) -> str:
        """The unrounded values; errors get a column of their own (`… se`), intervals two (`… low`, `… high`)."""
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        columns = [_csv_columns(name, column) for name, column in zip(self.header, cells, strict=True)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([name for names, _ in columns for name in names])
        writer.writerows([[value for _, cells in columns for value in cells[i]] for i in range(len(self.rows))])
        return text.getvalue()

    def latex(self) -> str:
        """A LaTeX table for the package booktabs."""
        kinds = "".join("r" if right else "l" for right in self.numeric())
        body = [" & ".join(row) + r" \\" for row in self.marked(r"\textbf{", "}", LATEX)]
        head = " & ".join(name.translate(LATEX) for name in self.titles()) + r" \\"
        caption = [rf"\caption{{{self.caption.translate(LATEX)}}}"] if self.caption else []
        tabular = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        lines = [r"\begin{table}", r"\centering", *caption, *tabular, r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines) + "\n"


def _csv_columns(name: str, column: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    """One column of the table as one to three columns of a CSV file: (names, values per row)."""
    if any(isinstance(cell, Interval) for cell in column):
        return [f"{name} low", f"{name} high"], [
            [cell.low, cell.high] if isinstance(cell, Interval) else ["", ""] for cell in column
        ]
    if any(isinstance(cell, WithInterval) for cell in column):
        return [name, f"{name} low", f"{name} high"], [
            [cell.value, cell.low, cell.high] if isinstance(cell, WithInterval) else ["", "", ""] for cell in column
        ]
    plain = [[_csv_value(cell)] for cell in column]
    errors = [cell.error if isinstance(cell, Number) else None for cell in column]
    if all(error is None for error in errors):
        return [name], plain
    shown = ["" if error is None or math.isnan(error) else error for error in errors]
    return [name, f"{name} se"], [[*cells, error] for cells, error in zip(plain, shown, strict=True)]


def _csv_value(cell: Cell) -> object:
    """A cell's unrounded value; "" for an empty cell or NaN."""
    if isinstance(cell, Number):
        return "" if math.isnan(cell.value) else cell.value
    return "" if cell == NOTHING else cell
