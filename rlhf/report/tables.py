"""One table, three ways to write it: Markdown, CSV and LaTeX."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

NOTHING = "–"
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", "−": "$-$", "√": r"$\surd$",
        "†": r"$\dagger$", "≥": r"$\geq$", "β": r"$\beta$", "α": r"$\alpha$",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A value with its standard error, if it has one; people read it rounded, CSV keeps it whole."""

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
    """Two ends of an interval."""

    low: float
    high: float
    digits: int = 1
    mark: str = ""

    def __str__(self) -> str:
        low, high = (str(Number(end, digits=self.digits, signed=True)) for end in (self.low, self.high))
        return f"{low} to {high}{self.mark}"


Cell = str | int | Number | Interval


@dataclass(frozen=True)
class Table:
    """Header, rows and a caption."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def texts(self) -> list[list[str]]:
        """The rows as people read them."""
        return [[str(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers (and are set flush right)."""
        columns = [[cell for cell in column if cell != NOTHING] for column in zip(*self.rows, strict=True)]
        numeric = [bool(cells) and not any(isinstance(cell, str) for cell in cells) for cells in columns]
        return numeric or [False] * len(self.header)

    def markdown(self) -> str:
        """A GitHub table, the caption below it."""
        rule = ["---:" if right else "---" for right in self.numeric()]
        cells = [[cell.replace("|", r"\|") for cell in row] for row in [list(self.header), rule, *self.texts()]]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        return "\n".join([*lines, "", self.caption] if self.caption else lines) + "\n"

    def csv(self) -> str:
        """Unrounded; an error or an interval gets columns of its own."""
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.header)
        columns = [_spread(name, column) for name, column in zip(self.header, cells, strict=True)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([name for names, _ in columns for name in names])
        writer.writerows([[value for _, cells in columns for value in cells[i]] for i in range(len(self.rows))])
        return text.getvalue()

    def latex(self) -> str:
        """A booktabs table."""
        kinds = "".join("r" if right else "l" for right in self.numeric())
        body = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in self.texts()]
        head = " & ".join(name.translate(LATEX) for name in self.header) + r" \\"
        caption = [rf"\caption{{{self.caption.translate(LATEX)}}}"] if self.caption else []
        tabular = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
        lines = [r"\begin{table}", r"\centering", *caption, *tabular, r"\end{tabular}", r"\end{table}"]
        return "\n".join(lines) + "\n"


def _spread(name: str, column: Sequence[Cell]) -> tuple[list[str], list[list[object]]]:
    """A column of a table as one or two columns of a CSV."""
    if any(isinstance(cell, Interval) for cell in column):
        return [f"{name} low", f"{name} high"], [
            [cell.low, cell.high] if isinstance(cell, Interval) else ["", ""] for cell in column
        ]
    plain = [[_plain(cell)] for cell in column]
    errors = [cell.error if isinstance(cell, Number) else None for cell in column]
    if all(error is None for error in errors):
        return [name], plain
    shown = ["" if error is None or math.isnan(error) else error for error in errors]
    return [name, f"{name} se"], [[*cells, error] for cells, error in zip(plain, shown, strict=True)]


def _plain(cell: Cell) -> object:
    if isinstance(cell, Number):
        return "" if math.isnan(cell.value) else cell.value
    return "" if cell == NOTHING else cell
