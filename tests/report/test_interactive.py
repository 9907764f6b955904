"""The interactive view holds every run's values and needs no network; without its library the page does without."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb

from rlhf.report import interactive
from rlhf.report.cli import make_report
from rlhf.report.interactive import SHOWN, TITLE, interactive_view, view_metrics
from rlhf.report.runs import Sweep
from tests.helpers.made_up_sweeps import STEPS, write_sweep

pytest.importorskip("bokeh")


@pytest.fixture(scope="module")
def view(sweep: Sweep) -> dict[str, Any]:
    return interactive_view(sweep) or pytest.fail("no view")


def sources(script: str) -> list[dict[str, list[Any]]]:
    """The columns of every data source in the script that draws."""
    (text,) = re.findall(r"const docs_json = '(.*?)';\n", script, flags=re.DOTALL)
    found: list[dict[str, list[Any]]] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("name") == "ColumnDataSource" and "data" in node.get("attributes", {}):
                found.append(dict(node["attributes"]["data"]["entries"]))
            node = list(node.values())
        for child in node if isinstance(node, list) else []:
            visit(child)

    visit(json.loads(text.encode().decode("unicode_escape").encode("latin-1").decode()))
    return found


def test_every_run_is_there_with_all_its_values(sweep: Sweep, view: dict[str, Any]) -> None:
    drawn = sources(view["script"])
    assert [source["row"][0] for source in drawn] == [row.label for row in sweep.trained]
    assert [row["label"] for row in view["rows"]] == [row.label for row in sweep.trained]
    for row, source in zip(sweep.trained, drawn, strict=True):
        for run in row.runs:
            lines = [i for i, name in enumerate(source["run"]) if name == run.name]
            assert len(lines) == len(STEPS) + 1  # and the gap before the next run
            evaluated = list(run.evaluations.values())
            assert [source["eval/win_rate"][i] for i in lines[:-1]] == pytest.approx(
                [100 * values["eval/win_rate"] for values in evaluated]
            )
            assert [source["sqrt_kl"][i] for i in lines[:-1]] == pytest.approx(
                [math.sqrt(max(values["eval/true_kl"], 0)) for values in evaluated]
            )
            assert f"ppo {run.seeds.ppo}" in source["seeds"][lines[0]]
        assert source[SHOWN] == source[view_metrics(sweep)[0]]
        assert set(source[TITLE]) == {"win rate (%)"}  # so that what is shown under the mouse has a name and a unit
    assert len(view["plots"]) == 2  # by step and by √KL


def test_rows_have_colours_that_a_dark_page_does_not_swallow(sweep: Sweep, view: dict[str, Any]) -> None:
    def luminance(color: str) -> float:
        red, green, blue = to_rgb(color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert min(luminance(row["dark"]) for row in view["rows"]) > 0.4
    assert min(luminance(row["color"]) for row in view["rows"]) < 0.4


def test_the_view_asks_nothing_of_the_network(view: dict[str, Any]) -> None:
    assert not re.search(r"https?://", view["script"])
    assert len(view["library"]) > 500_000
    assert "</script" not in view["library"]
    assert all("<script" not in plot for plot in view["plots"])


def test_the_page_holds_the_view_if_its_library_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"lora_kl": "</script><b>x</b>"}
    layout = {"figures": [{"name": "c", "kind": "curve", "y": "eval/reward"}], "labels": labels}
    folder = write_sweep(tmp_path / "s", layout, variants=["lora_kl"])
    text = make_report([folder]).read_text()
    assert "</script><b>x" not in text
    assert text.count('<input type="checkbox" checked ') == 1
    monkeypatch.setattr(interactive, "find_spec", lambda name: None)
    text = make_report([folder]).read_text()
    assert 'id="library"' not in text
    assert "data:image/svg+xml;base64," in text
