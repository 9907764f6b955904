"""Tables are drawn on a terminal, and are Markdown in a file."""

import os
import pty
import re
import sys

import pytest

from rlhf.report.tables import Interval, Number, Table
from rlhf.report.terminal import drawn, show_tables

TABLE = Table(
    ["player", "win rate"], [["divergence-none_replicate-1", Number(51.25)], ["reference", Number(48.75)]], "By rank."
)


def test_a_file_gets_markdown(capsys: pytest.CaptureFixture) -> None:
    show_tables([TABLE, TABLE])
    assert capsys.readouterr().out == f"{TABLE.markdown()}\n{TABLE.markdown()}\n"


def test_a_terminal_gets_drawn_tables_with_their_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = pty.openpty()
    with os.fdopen(far, "w") as terminal, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", terminal)
        show_tables([TABLE])
        terminal.flush()
        said = re.sub(r"\x1b\[[0-9;]*m", "", os.read(near, 65536).decode())
    os.close(near)
    lines = said.splitlines()
    assert "│ divergence-none_replicate-1 │ 51.2 │" in lines
    assert lines[-2:] == ["By rank.", ""]
    assert "|" not in said


def test_names_become_narrower_before_a_column_is_left_out() -> None:
    assert [column.width for column in drawn(TABLE, 38).columns] == [27, 4]
    narrow = drawn(TABLE, 31)
    assert [column.width for column in narrow.columns] == [20, 4]
    assert narrow.caption is None
    assert drawn(TABLE, 30).caption == "Columns that do not fit: win rate."


def test_the_footnote_of_a_mark_stands_under_the_drawn_table() -> None:
    rows = [["a", Interval(0.0, 1.0, mark="†")]]
    table = Table(["row", "95 % interval"], rows, "Means over seeds. † One seed only: nothing else counts. And more.")
    assert drawn(table, 80).caption == "† One seed only: nothing else counts."
    assert drawn(table, 12).caption == "Columns that do not fit: 95 % interval."
