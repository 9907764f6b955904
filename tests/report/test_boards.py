"""A sweep's W&B workspace and report, built offline from a real sweep; uploading them is not tested."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from rlhf import root
from rlhf.files import SUMMARY, read_json, write_json
from rlhf.report import sync
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.made_up_sweeps import write_run
from tests.helpers.wandb_files import read_runs

wr = pytest.importorskip("wandb_workspaces.reports.v2", reason="the extra dashboards is not installed")

import wandb_workspaces.workspaces as ws  # noqa: E402
from wandb_workspaces.reports.v2.internal import ReportViewspec  # noqa: E402
from wandb_workspaces.workspaces.internal import View  # noqa: E402

from rlhf.report.boards import REPORT, WORKSPACE, Boards, _filters  # noqa: E402

pytestmark = pytest.mark.slow
DOCUMENTED = set(re.findall(r"^\| `([a-z]+/\w+)` \|", (root() / "docs" / "metrics.md").read_text(), re.MULTILINE))
FIGURES = [
    {"name": "one", "title": "Figure 1", "kind": "curve", "x": "step", "y": "eval/win_rate"},
    {"name": "two", "title": "Figure 2", "kind": "path", "x": "eval/true_kl", "y": "eval/win_rate"},
    {"name": "three", "title": "Figure 3", "kind": "sqrt_kl", "y": ["eval/reward", "eval/gold_utility"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with two rows, logged offline."""
    place = tmp_path_factory.mktemp("boards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(place / "none"))
        wandb.teardown()
        figures = json.dumps(FIGURES).replace('"', "").replace("title: Figure ", "title: Figure")
        layout = f"report={{title: Small, baseline: kl, figures: {figures}}}"
        job = [*TINY, "logger=wandb", "name=study", "ppo.steps=1", "ppo.eval_every=1", layout]
        assert run_in_process("-m", *job, "divergence=kl,none") == 0
        wandb.finish()
        wandb.teardown()
    return place / "outputs/study"


def every(node: Any, key: str) -> Iterator[Any]:
    """All values of a key at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from every(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from every(value, key)


def metrics_of(spec: Any) -> set[str]:
    """The metrics that the panels of a specification draw."""
    drawn = {metric for metrics in every(spec, "metrics") for metric in metrics}
    axes = {axis for key in ("xAxis", "yAxis") for axis in every(spec, key)}
    return {name.removeprefix("summary:").removesuffix(".last") for name in drawn | axes} - {"_step"}


def test_the_end_of_a_sweep_leaves_both_specifications(folder: Path) -> None:
    for name in (WORKSPACE, REPORT):
        spec = read_json(folder / "report" / name)
        assert spec["entity" if name == WORKSPACE else "displayName"] == ("" if name == WORKSPACE else "Small")
        assert len(metrics_of(spec)) > 5


def test_every_panel_draws_what_the_runs_logged(folder: Path) -> None:
    runs = [run for run in read_runs(folder) if run.stage == "ppo"]
    assert len(runs) == 2
    for name in (WORKSPACE, REPORT):
        drawn = metrics_of(read_json(folder / "report" / name)) - {"step"}
        assert drawn <= DOCUMENTED
        for run in runs:
            assert drawn <= run.keys
            assert all("last" in run.summary[metric] for metric in drawn)


def test_a_sweep_over_methods_shows_the_runs_of_all() -> None:
    runs = [SimpleNamespace(summary={"stage": stage, "identity": "0"}) for stage in ("ppo", "dpo", "ppo")]
    chosen = repr(_filters(SimpleNamespace(finished=runs), "study"))  # type: ignore[arg-type]
    assert "dpo" in chosen
    assert "ppo" in chosen


def test_the_filters_and_rows_are_those_of_the_runs(folder: Path) -> None:
    boards = Boards.of(folder)
    assert boards.workspace().runset_settings.filters == "Metric(\"Group\") == 'study' and Metric(\"JobType\") == 'ppo'"
    runs = [run for run in read_runs(folder) if run.stage == "ppo"]
    assert all(run.group == "study" and run.project == boards.project for run in runs)
    labels = {row.label for row in boards.sweep.trained}
    assert {run.config["row"] for run in runs} == labels
    assert len(labels) == 2
    grouped = set(every(read_json(folder / "report" / WORKSPACE), "groupBy"))
    assert grouped == {"row.value"}


def test_the_figures_are_panels_with_their_axes(folder: Path) -> None:
    panels = Boards.of(folder).figures()
    axes = [(panel.x.name if isinstance(panel.x, wr.Metric) else panel.x, panel.y[0]) for panel in panels]
    assert axes == [
        ("step", "eval/win_rate"), ("eval/true_kl", "eval/win_rate"),
        ("eval/true_kl", "eval/reward"), ("eval/true_kl", "eval/gold_utility"),
    ]  # fmt: skip
    assert Boards.of(folder).bars()[0].metrics == ["eval/win_rate.last"]
    assert Boards.of(folder).front() == []


def test_specifications_survive_a_round_trip_through_the_library(folder: Path) -> None:
    """The library's own models read the specification and write the same again."""
    report = folder / "report"
    written = read_json(report / WORKSPACE)
    workspace = ws.Workspace._from_model(View.model_validate(written))
    again = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    assert again["spec"]["section"]["panelBankConfig"] == written["spec"]["section"]["panelBankConfig"]
    assert [section.name for section in workspace.sections] == ["Table", "Figures"]
    assert workspace.runset_settings.filters == Boards.of(folder).workspace().runset_settings.filters
    page = wr.Report._from_model(ReportViewspec.model_validate(read_json(report / REPORT)))
    grids = [block for block in page.blocks if isinstance(block, wr.PanelGrid)]
    assert [len(grid.panels) for grid in grids] == [len(section.panels) for section in workspace.sections]
    assert any("| row | seeds |" in block.text for block in page.blocks if isinstance(block, wr.MarkdownBlock))


def test_runs_taken_over_are_found_by_their_ids_and_a_search_has_its_front(tmp_path: Path) -> None:
    sweep = tmp_path / "search"
    logger = {"_target_": "rlhf.tracking.dashboards.wandb_logger", "project": "p", "group": "search", "entity": None}
    objectives = {"eval/win_rate": "maximize", "eval/true_kl": "minimize"}
    for seed, more in ((1, {"same_as": "../elsewhere"}), (2, {})):
        config = {"seed": seed, "logger": logger, "objectives": objectives}
        write_run(sweep / f"seed-{seed}", "lora_kl", seed, config=config, identity=f"a{seed}", **more)
    boards = Boards.of(sweep)
    assert boards.workspace().runset_settings.filters == "Metric(\"ID\") in ['ppo-a1', 'ppo-a2']"
    (spec,) = [json.loads(panel._to_model().model_dump_json(by_alias=True)) for panel in boards.front()]
    assert spec["config"]["xAxis"] == "summary:eval/true_kl.last"
    assert spec["config"]["yAxis"] == "summary:eval/win_rate.last"


def test_a_figure_that_needs_no_runs_has_no_panel(tmp_path: Path) -> None:
    logger = {"_target_": "rlhf.tracking.dashboards.wandb_logger", "project": "p", "group": "s", "entity": None}
    figures = [{"name": "pull", "kind": "pull"}, FIGURES[0]]
    config = {"seed": 1, "logger": logger, "report": {"figures": figures}}
    write_run(tmp_path / "s/a", "lora_kl", 1, config=config)
    assert [panel.y for panel in Boards.of(tmp_path / "s").figures()] == [["eval/win_rate"]]


def run_sync(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from rlhf.report.sync import sync; sync()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    kept |= {"PYTHONPATH": os.pathsep.join(sys.path), "NETRC": "/nowhere", **environment}
    return subprocess.run(command, env=kept, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """Folders of a sweep with nothing to synchronise."""
    logger = {"_target_": "rlhf.tracking.dashboards.wandb_logger", "project": "p", "group": "made_up", "entity": None}
    write_run(tmp_path / "s/a", "lora_kl", 1, config={"seed": 1, "name": "made_up", "logger": logger})
    return tmp_path / "s"


@pytest.mark.long
def test_without_a_key_the_specifications_are_written_and_one_sentence_says_so(sent: Path) -> None:
    done = run_sync(sent, "--boards")
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("rlhf-sync: ")]
    assert "Traceback" not in done.stderr
    assert "no boards were put into W&B" in said
    assert "wandb login" in said
    assert (sent / "report" / WORKSPACE).exists()


def test_a_dry_run_writes_and_does_not_ask(sent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf-sync", str(sent), "--boards", "--dry-run"])
    with pytest.raises(SystemExit) as left:
        sync.sync()
    assert left.value.code == 0
    assert (sent / "report" / REPORT).exists()


@pytest.mark.long
def test_a_missing_server_is_reported_in_one_sentence(sent: Path) -> None:
    done = run_sync(sent, "--boards", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "no boards were put into W&B" in done.stderr


def test_a_sweep_that_was_not_logged_is_refused(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = read_json(sent / "a" / SUMMARY)
    summary["config"]["logger"] = {"_target_": "lightning.pytorch.loggers.CSVLogger"}
    write_json(sent / "a" / SUMMARY, summary)
    monkeypatch.setattr(sys, "argv", ["rlhf-sync", str(sent), "--boards"])
    with pytest.raises(SystemExit) as left:
        sync.sync()
    assert left.value.code == 2
    assert "allowed: a sweep made with logger=wandb" in capsys.readouterr().err


def test_without_the_extra_one_sentence_says_what_to_install(
    sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rlhf.report.boards", None)
    monkeypatch.setattr(sys, "argv", ["rlhf-sync", str(sent), "--boards"])
    with pytest.raises(SystemExit) as left:
        sync.sync()
    assert left.value.code == 2
    assert "pip install -e '.[dashboards]' in the checkout" in capsys.readouterr().err
