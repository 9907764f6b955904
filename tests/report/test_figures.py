"""The figures show the numbers of the table, on axes that do not exaggerate, on light and on dark pages."""

import csv
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from rlhf.report import statistics as st
from rlhf.report.column_differences import column_differences, compare_values
from rlhf.report.comparisons import comparisons, mean_over, origins
from rlhf.report.course_figures import PANELS, Scene, draw_courses
from rlhf.report.courses import Course
from rlhf.report.diagnostics_figure import draw_diagnostics
from rlhf.report.figure_style import DARK, INK, SPANS, looks, wide_enough, with_dark_variant
from rlhf.report.figures import make_figures
from rlhf.report.forest import draw_differences, draw_gains, draw_results
from rlhf.report.results import columns
from rlhf.report.runs import Sweep, load
from tests.helpers.made_up_sweeps import STEPS, write_run, write_sweep

WIN, KL = "eval/win_rate", "eval/true_kl"


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def based(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep whose layout names a baseline."""
    return load([write_sweep(tmp_path_factory.mktemp("figures") / "s", {"baseline": "lora_kl"})])


def visible(axes: list[Axes]) -> list[Axes]:
    return [each for each in axes if each.get_visible()]


def scene(rows: int, kind: str = "curve", **changes: object) -> Scene:
    """Rows whose win rate rises by their position per step, on three replicates."""
    labels = [f"row {i}" for i in range(rows)]
    spread = np.array([-1.0, 0.0, 1.0])
    courses = [
        Course(
            label,
            (KL, WIN),
            {step: np.stack([np.full(3, step**2 / 100), 20 + i * step + spread], axis=1) for step in (0, 1, 2, 3)},
        )
        for i, label in enumerate(labels)
    ]
    settings: dict[str, object] = {"starts": {WIN: 20.0}, "against": "row 0"} | changes
    return Scene("Title", kind, {WIN: courses}, looks(labels), x_title="x", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["curve", "path", "sqrt_kl", "distance"])
def test_many_rows_get_a_panel_each_before_the_baseline_and_sft(kind: str) -> None:
    drawn = scene(6, kind)
    figure, numbers = draw_courses(drawn)
    panels = visible(figure.axes)
    assert [panel.get_title(loc="center") or panel.get_title(loc="left") for panel in panels] == drawn.rows
    assert len(numbers) == 6 * 4
    for i, panel in enumerate(panels):
        lines = [line for line in panel.lines if line.get_color() == drawn.looks[f"row {i}"].color]
        heights = [list(line.get_ydata()) for line in lines]
        assert [20, 20 + i, 20 + 2 * i, 20 + 3 * i] in [[round(float(y), 6) for y in each] for each in heights]
        assert any(line.get_gid() == "SFT" and list(line.get_ydata()) == [20, 20] for line in panel.lines)
        behind = [line for line in panel.lines if line.get_color() == "#9AA0A6"]
        assert len(behind) == (i > 0)  # the baseline is behind all but itself
        assert panel.get_ylim() == panels[0].get_ylim()
    assert "baseline: row 0" in [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_few_rows_share_a_panel_and_more_than_panels_can_show_do_too() -> None:
    figure, _ = draw_courses(scene(4))
    assert len(figure.axes) == 1
    figure, numbers = draw_courses(scene(PANELS + 1))
    assert len(figure.axes) == 1
    assert len(numbers) == 4 * (PANELS + 1)


def test_a_path_has_error_bars_in_both_directions() -> None:
    varied = scene(2, "path")
    for course in varied.courses[WIN]:
        for pairs in course.points.values():
            pairs[:, 0] += [0.0, 0.1, 0.2]
    figure, numbers = draw_courses(varied)
    bars = [path.vertices for bar in figure.axes[0].collections for path in bar.get_paths()]
    error = st.replicate_error([0.0, 0.1, 0.2])
    across = [ends for ends in bars if ends[0, 1] == ends[1, 1]]
    up = [ends for ends in bars if ends[0, 0] == ends[1, 0]]
    assert len(across) == len(up) == 2 * 4
    assert across[0][1, 0] - across[0][0, 0] == pytest.approx(2 * error)
    assert up[0][1, 1] - up[0][0, 1] == pytest.approx(2 * float(numbers[0][f"{WIN} se"]))


@pytest.mark.parametrize(("metric", "unit"), [(WIN, "%"), (KL, "nats per token"), ("eval/response_tokens", "tokens")])
def test_an_axis_shows_at_least_the_span_of_its_metric(metric: str, unit: str) -> None:
    low, high = wide_enough(20.0, 20.001, metric)
    assert high - low == pytest.approx(SPANS[unit])
    low, high = wide_enough(0.0, 50.0, metric)
    assert low <= 0
    assert high >= 50


def test_an_axis_of_percentages_keeps_to_what_can_be() -> None:
    low, high = wide_enough(99.9, 100.0, WIN)
    assert high <= 102
    assert low <= 99.9
    assert high - low == pytest.approx(10)
    assert wide_enough(-30.0, 20.0, WIN)[0] < -30  # a difference


def test_results_draw_the_intervals_of_the_table(sweep: Sweep) -> None:
    figure, numbers = draw_results(sweep, "Results") or pytest.fail("no figure")
    row = sweep.trained[0]
    mean = mean_over(row, WIN)
    assert mean is not None
    drawn = [line for line in figure.axes[0].lines if line.get_gid() == row.label]
    assert [float(line.get_xdata()[0]) for line in drawn] == pytest.approx([100 * mean.mean])
    ends = [list(map(float, line.get_xdata())) for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [100 * mean.low, 100 * mean.high] in [[pytest.approx(end) for end in pair] for pair in ends]
    assert "higher is better →" in figure.axes[0].get_xlabel()
    assert {line["row"] for line in numbers} == {row.label for row in sweep.rows}


def test_differences_are_drawn_for_every_column_and_agree_with_the_table(based: Sweep) -> None:
    against = origins(based)[1]
    found = column_differences(based, against)
    assert {item.metric for item in found} == {metric for metric in columns(based) if against.values(metric)}
    table = comparisons(based, against, [WIN])
    assert [item.difference for item in found if item.metric == WIN] == [item.difference for item in table]
    assert [item.stands for item in found if item.metric == WIN] == [item.stands for item in table]
    figure, numbers = draw_differences(based, "Differences from the baseline") or pytest.fail("no figure")
    assert figure.get_suptitle() == "Differences from “variant=lora_kl”"
    first = next(line for line in numbers if line["metric"] == WIN)
    assert (first["mean"], first["low"]) == (100 * table[0].difference.mean, 100 * table[0].difference.low)
    filled = {line.get_gid(): line.get_mfc() != "#FFFFFF" for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert filled == {item.row.label: item.stands for item in table}


def test_without_a_baseline_there_are_gains_alone(sweep: Sweep) -> None:
    assert draw_differences(sweep, "Differences") is None
    _, numbers = draw_gains(sweep, "Gains") or pytest.fail("no figure")
    assert {line["row"] for line in numbers} == {row.label for row in sweep.trained}


def test_values_over_replicates_are_compared_by_students_t(sweep: Sweep) -> None:
    from scipy.stats import ttest_ind

    a, b = sweep.trained[:2]
    item = compare_values(a, b, KL, pair=False)
    assert item is not None
    welch = ttest_ind(a.values(KL), b.values(KL), equal_var=False)
    interval = welch.confidence_interval()
    assert (item.difference.low, item.difference.high) == pytest.approx((interval.low, interval.high))
    assert item.difference.p_value == pytest.approx(welch.pvalue, rel=1e-6)


def test_single_values_are_not_compared(tmp_path: Path) -> None:
    for variant in ("lora_kl", "lora_none"):
        write_run(tmp_path / "s" / variant, variant, 1, overrides=[f"variant={variant}"])
    sweep = load([tmp_path / "s"])
    assert compare_values(sweep.trained[0], sweep.trained[1], KL, pair=False) is None


@pytest.mark.filterwarnings("error")
def test_one_row_with_a_long_label_has_place(tmp_path: Path) -> None:
    """Matplotlib would say on the terminal that a layout does not fit."""
    long = [f"data.some_rather_long_key_{i}=some_value" for i in range(30)]
    write_run(tmp_path / "s" / "run", "lora_kl", 1, overrides=long)
    figure, _ = draw_results(load([tmp_path / "s"]), "Results") or pytest.fail("no figure")
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[-1].count("\n") == 3
    assert labels[-1].endswith(" …")


def test_diagnostics_draw_what_was_logged(sweep: Sweep) -> None:
    figure, numbers = draw_diagnostics(sweep, "PPO") or pytest.fail("no figure")
    assert len(visible(figure.axes)) == 2  # ppo/reward and ppo/missing_eos
    row = sweep.trained[0]
    last = [run.metrics[STEPS[-1]]["ppo/reward"] for run in row.runs]
    (line,) = [each for each in numbers if (each["metric"], each["row"], each["step"]) == ("ppo/reward", row.label, 50)]
    assert line["mean"] == pytest.approx(np.mean(last))


def test_the_files_of_a_report_follow_the_readers_choice_of_a_dark_page(tmp_path: Path) -> None:
    layout = {"figures": [{"name": "curve", "kind": "curve", "y": WIN}]}
    sweep = load([write_sweep(tmp_path / "s", layout, variants=["lora_kl"])])
    made = make_figures(sweep, tmp_path)
    assert [figure["kind"] for figure in made] == ["results", "gains", "curve", "diagnostics"]
    for figure in made:
        svg = (tmp_path / f"{figure['name']}.svg").read_text()
        assert svg.count("@media (prefers-color-scheme: dark)") == 1
        assert f'[style*="fill: {INK.lower()}"] {{ fill: {DARK[INK].lower()} !important }}' in svg
        assert "url(http" not in svg
        assert "<text" in svg  # text stays text
    svg = (tmp_path / "curve.svg").read_text()
    assert 'id="SFT"' in svg
    assert "higher is better ↑" in svg
    with (tmp_path / "curve.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last[WIN]) == pytest.approx(100 * np.mean(sweep.trained[0].values(WIN)))


def test_nothing_but_the_dark_colours_is_added_to_an_svg() -> None:
    plain = '<svg><defs></defs><path style="fill: #ffffff"/></svg>'
    assert with_dark_variant(plain).endswith('<defs></defs><path style="fill: #ffffff"/></svg>')


def test_an_empty_list_of_figures_means_none(tmp_path: Path) -> None:
    sweep = load([write_sweep(tmp_path / "s", {"figures": []}, variants=["lora_kl"])])
    assert make_figures(sweep, tmp_path / "figures") == []
