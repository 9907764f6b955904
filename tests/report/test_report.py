"""The report: tables, figures, page and command, from made-up runs."""

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlhf import root
from rlhf.errors import NoRunsError
from rlhf.report import statistics as st
from rlhf.report.cli import main, make_report
from rlhf.report.comparisons import comparisons
from rlhf.report.figure_style import looks
from rlhf.report.metric_info import EVAL_METRICS, metric_info
from rlhf.report.page import config_difference
from rlhf.report.results import main_table
from rlhf.report.runs import Sweep, load
from rlhf.report.tables import Interval, Number, Table
from tests.helpers.made_up_sweeps import PROMPTS, STEPS, write_lines, write_run, write_sweep


def test_the_caption_says_what_a_standard_error_over_few_seeds_covers(sweep: Sweep) -> None:
    made = np.random.default_rng(0).normal(size=(100_000, 3))
    scaled = abs(made.mean(1)) / (made.std(1, ddof=1) / math.sqrt(3))
    assert st.covered(3, 1) == pytest.approx(np.mean(scaled <= 1), abs=0.005)
    assert st.covered(3, 1.96) == pytest.approx(np.mean(scaled <= 1.96), abs=0.005)
    assert st.errors_for(3) == pytest.approx(4.303, abs=0.001)
    caption = main_table(sweep).caption
    assert "With 3 seeds ± holds the true mean in 58 % of cases and ±1.96 standard errors in 81 %" in caption
    assert "for 95 % it takes ±4.3 of them" in caption


# -- tables ------------------------------------------------------------------------------------------------------------

TABLE = Table(
    ["row", "rate (%)", "gap", "kind"],
    [["a_b & c", Number(31.25, 1.5), Interval(-1.25, 0.5, 2), "x"], ["d|e", Number(-0.5, math.nan), "–", "±"]],
    "50 % of it.",
)


def test_a_table_renders_as_markdown() -> None:
    assert TABLE.markdown() == (
        "| row | rate (%) | gap | kind |\n| --- | ---: | ---: | --- |\n"
        "| a_b & c | 31.2 ± 1.5 | −1.25 to +0.50 | x |\n| d\\|e | −0.5 | – | ± |\n\n50 % of it.\n"
    )


def test_a_table_renders_as_csv() -> None:
    assert TABLE.csv() == (
        "row,rate (%),rate (%) se,gap low,gap high,kind\na_b & c,31.25,1.5,-1.25,0.5,x\nd|e,-0.5,,,,±\n"
    )
    assert Table(["a", "b"], []).csv() == "a,b\n"


def test_a_table_renders_as_latex() -> None:
    assert TABLE.latex() == (
        "\\begin{table}\n\\centering\n\\caption{50 \\% of it.}\n\\begin{tabular}{lrrl}\n\\toprule\n"
        "row & rate (\\%) & gap & kind \\\\\n\\midrule\n"
        "a\\_b \\& c & 31.2 $\\pm$ 1.5 & $-$1.25 to +0.50 & x \\\\\nd|e & $-$0.5 & -- & $\\pm$ \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )


def test_the_best_number_of_a_column_is_marked_wherever_a_reader_sees_it() -> None:
    rows = [
        ["a", Number(2.04, 0.5), Number(5.0)],
        ["b", Number(2.01), Number(7.0)],
        ["c", Number(1.0), Number(math.nan)],
    ]
    table = Table(["row", "rate (%)", "lost"], rows, better={"rate (%)": "↑", "lost": "↓"})
    marked = [[False, True, True], [False, True, False], [False, False, False]]  # 2.04 and 2.01 are both shown as 2.0
    assert table.best() == marked
    assert "| row | rate (%) ↑ | lost ↓ |" in table.markdown()
    assert "| a | **2.0 ± 0.5** | **5.0** |\n| b | **2.0** | 7.0 |" in table.markdown()
    assert "rate (\\%) $\\uparrow$ & lost $\\downarrow$" in table.latex()
    assert "a & \\textbf{2.0 $\\pm$ 0.5} & \\textbf{5.0}" in table.latex()
    assert table.csv().splitlines()[:2] == ["row,rate (%),rate (%) se,lost", "a,2.04,0.5,5.0"]
    alike = Table(["x"], [[Number(1.0)], [Number(1.0)]], better={"x": "↑"})
    assert not any(map(any, alike.best()))


def test_columns_without_content_are_left_out(tmp_path: Path) -> None:
    empty = Table(["row", "a", "b"], [["x", "–", 1], ["y", Number(math.nan), 2]]).without_empty()
    assert (list(empty.header), empty.texts()) == (["row", "b"], [["x", "1"], ["y", "2"]])
    folder = write_sweep(tmp_path / "s", variants=["lora_kl"])
    for path in folder.glob("*/summary.json"):
        text = re.sub(r'"eval/(factual_precision|win_rate)": [\d.]+', r'"eval/\1": 0.0', path.read_text())
        path.write_text(text)
    table = main_table(load([folder]))
    assert "factual precision (%)" not in table.header
    assert "win rate (%)" in table.header  # to lose every comparison is a result
    assert "0 in every row, and left out: factual precision." in table.caption


def test_main_table_shows_what_is_there_or_what_is_asked_for(sweep: Sweep, tmp_path: Path) -> None:
    table = main_table(sweep)
    assert table.header[:5] == ["row", "seeds", "win rate (%)", "95 % interval", "judge SE (points)"]
    assert str(table.rows[0][1]) == "–"
    assert re.fullmatch(r"\d\d\.\d ± \d\.\d", str(table.rows[1][2]))
    asked = write_sweep(tmp_path / "s", {"columns": ["eval/factual_precision", "eval/facts_per_response"]}, ["lora_kl"])
    chosen = load([asked])
    assert main_table(chosen).header[:4] == ["row", "seeds", "factual precision (%)", "95 % interval"]


def test_every_documented_metric_of_an_evaluation_has_a_name_and_a_unit() -> None:
    documented = set(re.findall(r"^\| `(eval/\w+)` \|", (root() / "docs/metrics.md").read_text(), re.MULTILINE))
    assert len(documented) > 15
    derived = ("_se", "_fall")  # standard errors, and falls below the best evaluation: no columns of their own
    assert {name for name in documented if not name.endswith(derived)} <= set(EVAL_METRICS)
    assert metric_info("eval/factual_precision_obscure").unit == metric_info("eval/factual_precision").unit == "%"


def test_comparisons_are_one_family(sweep: Sweep) -> None:
    found = comparisons(sweep, sweep.rows[2], ["eval/win_rate"])
    assert [item.row.label for item in found] == ["variant=full_none", "variant=lora_none"]
    assert [item.difference.verdict for item in found] == ["higher", "not distinguishable"]
    assert found[0].need is None
    assert found[1].need is not None


# -- figures, page and command -----------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects the links of a page and asserts that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


LAYOUT = {
    "title": "A <made-up> study",
    "baseline": "lora_kl",
    "labels": {"lora_kl": "LoRA, KL", "full_none": "full, none"},
    "notes": "Just a test.",
    "figures": [
        {"name": "curve", "title": "Win rate", "kind": "curve", "x": "step", "y": "eval/win_rate"},
        {"name": "path", "title": "Path", "kind": "path", "x": "eval/true_kl", "y": "eval/win_rate"},
        {"name": "root", "kind": "sqrt_kl", "y": ["eval/reward", "eval/gold_utility"], "rows": ["lora_kl"]},
        {"name": "nothing", "kind": "curve", "y": "eval/absent"},
    ],
}


FIGURES = ("results", "gains", "differences", "curve", "path", "root", "diagnostics")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report([write_sweep(tmp_path_factory.mktemp("report") / "s", LAYOUT)]).parent


def test_a_report_has_all_its_files(report: Path) -> None:
    figures = [f"figures/{name}.{kind}" for name in FIGURES for kind in ("csv", "png", "svg")]
    compared = ("differences", "differences_by_column", "gains", "gains_by_column")
    names = (*compared, "distance", "distance_differences", "table", "variance")
    tables = [f"{name}.{kind}" for name in names for kind in ("csv", "md", "tex")]
    files = sorted(str(path.relative_to(report)) for path in report.rglob("*") if path.is_file())
    assert files == sorted([*figures, *tables, "report.html", ".made.json"])
    assert "| LoRA, KL | 3 |" in (report / "table.md").read_text()
    assert "Each row minus “LoRA, KL”" in (report / "differences.md").read_text()
    assert "Each row minus “SFT”" in (report / "gains.md").read_text()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_csv_files_hold_the_numbers_of_the_figures(report: Path) -> None:
    sweep = load([report.parent])
    lines = read_csv(report / "figures" / "curve.csv")
    assert len(lines) == 3 * len(STEPS)
    row = sweep.rows[1]
    last = next(line for line in lines if line["row"] == row.label and line["step"] == "50")
    assert float(last["eval/win_rate"]) == pytest.approx(100 * np.mean(row.values("eval/win_rate")))
    assert float(last["se"]) == pytest.approx(100 * st.replicate_error(row.values("eval/win_rate")))
    root = read_csv(report / "figures" / "root.csv")
    assert {line["row"] for line in root} == {"LoRA, KL"}
    assert float(root[0]["slope"]) == pytest.approx(0.6, abs=0.05)


def test_the_page_needs_nothing_beside_it(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert page.open == []
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert not re.search(r"https?://|@import|url\(", without_library(text))
    for words in ("A &lt;made-up&gt; study", "Tell me about &lt;0&gt;.", "<ins>50</ins> &amp; more", "lora.r=8",
                  "9 of 9 runs are finished", "Holm", "Just a test."):  # fmt: skip
        assert words in text


def without_library(text: str) -> str:
    """The page without the library of its interactive view, whose comments name addresses that nothing asks for."""
    return re.sub(r'<script id="library">.*?</script>', "", text, flags=re.DOTALL)


def test_config_difference_lists_changed_and_absent_keys() -> None:
    reference = {"seed": 1, "lora": {"r": 8, "alpha": 64}, "ppo": {"steps": 50}, "logger": {"dir": "a"}}
    ours = {"seed": 2, "lora": {"r": 0}, "ppo": {"steps": 50, "lr": None}, "logger": {"dir": "b"}}
    assert config_difference(ours, reference) == ["lora.r=0", "ppo.lr=null", "lora.alpha: absent"]


def test_bare_runs_make_a_report_too(tmp_path: Path) -> None:
    """Runs without overrides, outcomes, samples and judge, as older versions wrote them."""
    write_run(tmp_path / "s" / "seed-1", "lora_kl", 1)
    folder = tmp_path / "s" / "seed-1"
    summary = json.loads((folder / "summary.json").read_text())
    del summary["overrides"]
    for metrics in (summary["metrics"], summary["sft_metrics"]):
        del metrics["eval/win_rate"]
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in ("outcomes", "samples", "metrics"):
        (folder / f"{name}.jsonl").unlink()
    page = make_report([tmp_path / "s"], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert not (tmp_path / "out" / "differences.md").exists()
    assert "The runs have no samples" in page.read_text()


def test_a_run_that_diverged_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl", "lora_none"]) / "variant-lora_none_seed-3"
    for name, key in (("metrics", "eval/win_rate"), ("outcomes", "win")):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        broken = [{**line, key: [math.nan] * PROMPTS if name == "outcomes" else math.nan} for line in lines]
        write_lines(folder / f"{name}.jsonl", broken)
    summary = json.loads((folder / "summary.json").read_text())
    summary["metrics"]["eval/win_rate"] = math.nan
    (folder / "summary.json").write_text(json.dumps(summary))
    text = make_report([tmp_path / "s"]).read_text()
    assert "“variant=lora_none, seed=3” has non-finite values in eval/win_rate" in text
    assert "“variant=lora_none” has no finite win rate, because a run diverged, and cannot be ranked." in text


def test_the_command_prints_the_table_and_writes_the_report(
    sweep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(sweep_folder), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "variant=lora_kl" in shown
    assert "report.html" in shown
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "results", "gains", "win_rate", "true_kl", "response_tokens", "win_rate_by_kl", "diagnostics",
    }  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "holds no finished run" in capsys.readouterr().err
    with pytest.raises(NoRunsError):
        load([tmp_path / "absent"])


def test_a_figure_of_no_known_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "s" / "a", "lora_kl", 1, {"figures": [{"name": "x", "y": "eval/reward", "kind": "pie"}]})
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "s")])
    assert stopped.value.code == 2
    assert "allowed: curve, path, sqrt_kl" in capsys.readouterr().err


def test_every_row_has_a_look_of_its_own() -> None:
    found = looks([str(i) for i in range(20)])
    assert len({(look.color, look.line) for look in found.values()}) == 20


def test_a_label_of_any_length_leaves_room_for_the_panel(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from rlhf.report.figure_labels import End, make_room
    from rlhf.report.figure_style import looks

    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    label = "x" * 300
    make_room(figure, [[End(1, 1, label, looks([label])[label])]])
    assert axes.get_position().width > 0.3
