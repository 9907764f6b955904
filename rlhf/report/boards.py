"""A sweep's *boards*: a workspace and a report in W&B, with the table's metrics as bars and every figure as a panel.

Their specifications are built offline from the run folders and written beside the report. `rlhf-sync --boards` uploads
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from rlhf.errors import NoRunsError
from rlhf.files import read_json, write_json
from rlhf.objectives import objectives_of
from rlhf.report.figures import ROOTED, figure_specs, x_metric, y_metrics
from rlhf.report.metric_info import metric_info
from rlhf.report.pareto_front import front_table
from rlhf.report.results import columns, main_table
from rlhf.report.runs import Sweep, load

WORKSPACE, REPORT, PUSHED = "wandb_workspace.json", "wandb_report.json", "wandb_pushed.json"
STEP, ROW = "step", "row"  # in W&B: the x axis of runs, and the key of their configuration that names their row
LAST = ".last"  # a metric's last value: W&B's summary also has its minimum and maximum
MOST_RUNS = 100
ROOT_NOTE = "W&B has no square root axis: this is against the KL itself."


@dataclass(frozen=True)
class Boards:
    """The boards of one sweep.

    Attributes:
        sweep: the sweep as its folders record it.
        name: the name of its folder.
        project: the W&B project to which its runs were logged.
        entity: the user or team that owns the project; None for the default one.
        filters: what selects the sweep's runs in the project.
    """

    sweep: Sweep
    name: str
    project: str
    entity: str | None
    filters: expr.And

    @classmethod
    def of(cls, folder: Path) -> "Boards":
        """The boards of the sweep in `folder`.

        Raises:
            NoRunsError: the sweep has no finished run, or its runs were not logged to W&B.
        """
        sweep = load([folder])
        config = sweep.finished[0].config
        logger = config.get("logger") or {}
        if not str(logger.get("_target_", "")).endswith("wandb_logger"):
            raise NoRunsError(f"{folder} was not logged to W&B; allowed: a sweep made with logger=wandb")
        filters = _filters(sweep, str(logger["group"]))
        return cls(sweep, folder.resolve().name, str(logger["project"]), logger.get("entity"), filters)

    @property
    def title(self) -> str:
        """The title of the report."""
        return str(self.sweep.layout.get("title") or self.name)

    def workspace(self, entity: str = "") -> ws.Workspace:
        """A view of the project with the sweep's runs grouped by row: sections of bars, figures, and for a search."""
        sections = [
            ws.Section("Table", panels=self.bars(), is_open=True, pinned=True),
            ws.Section("Figures", panels=self.figures(), is_open=True),
        ]
        if self.front():
            sections.append(ws.Section("Search", panels=self.front(), is_open=True))
        return ws.Workspace(
            entity,
            self.project,
            name=self.name,
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=MOST_RUNS),
            runset_settings=ws.RunsetSettings(
                filters=self.filters,
                groupby=[expr.Config(ROW)],
                pinned_columns=self._pinned_columns,
            ),
        )

    def report(self, entity: str = "") -> wr.Report:
        """A page with the tables of the offline report and the panels of the workspace."""
        front = front_table(self.sweep)
        tables = [main_table(self.sweep)] + ([front] if front else [])
        blocks: list[Any] = [wr.H1("Results"), *(wr.MarkdownBlock(table.markdown()) for table in tables)]
        if notes := self.sweep.layout.get("notes"):
            blocks.insert(0, wr.P(str(notes)))
        for title, panels in (("Table", self.bars()), ("Figures", self.figures()), ("Search", self.front())):
            if panels:
                blocks += [wr.H1(title), wr.PanelGrid(runsets=[self._runs(entity)], panels=panels)]
        return wr.Report(self.project, entity=entity, title=self.title[:128], blocks=blocks, width="fluid")

    @property
    def metrics(self) -> list[str]:
        """The metrics of the main table that at least one row has."""
        return [metric for metric in columns(self.sweep) if any(row.values(metric) for row in self.sweep.rows)]

    @property
    def _pinned_columns(self) -> list[str]:
        """The metrics that W&B shows beside the names of runs."""
        return [f"summary:{metric}{LAST}" for metric in self.metrics]

    def bars(self) -> list[wr.BarPlot]:
        """The main table as bar plots: the last value of each metric by row, with the standard error over runs."""
        return [
            wr.BarPlot(title=metric_info(metric).name, metrics=[f"{metric}{LAST}"], **_over_runs())
            for metric in self.metrics
        ]

    def figures(self) -> list[wr.LinePlot]:
        """The figures of the layout, one panel for each metric on a y axis."""
        specs = [spec for spec in figure_specs(self.sweep.layout) if "y" in spec]
        return [self._line(spec, y) for spec in specs for y in y_metrics(spec)]

    def front(self) -> list[wr.ScatterPlot]:
        """The first two objectives of a search against each other, one point per run; [] with fewer objectives."""
        objectives = list(objectives_of(self.sweep.finished[0].config))
        if len(objectives) < 2:
            return []
        y, x = (wr.SummaryMetric(f"{metric}{LAST}") for metric in objectives[:2])
        names = [metric_info(metric).name for metric in objectives[:2]]
        return [wr.ScatterPlot(title=f"{names[0]} against {names[1]}", x=x, y=y)]

    def write(self, folder: Path) -> list[Path]:
        """Write the specifications of workspace and report as JSON; returns their paths."""
        folder.mkdir(exist_ok=True)
        paths = [folder / WORKSPACE, folder / REPORT]
        for path, board in zip(paths, (self.workspace(), self.report()), strict=True):
            write_json(path, board._to_model().model_dump(mode="json", by_alias=True, exclude_none=True))
        return paths

    def push(self, entity: str, folder: Path) -> list[str]:
        """Upload workspace and report to W&B and return their addresses.

        Those that were uploaded before, according to a note in `folder`, are replaced.
        """
        known = read_json(folder / PUSHED) if (folder / PUSHED).exists() else {}
        workspace, report = self.workspace(entity), self.report(entity)
        workspace._internal_name, workspace._internal_id = known.get("workspace", ("", ""))
        report.id = known.get("report", "")
        workspace.save()
        report.save()
        ids = {"workspace": [workspace._internal_name, workspace._internal_id], "report": report.id}
        write_json(folder / PUSHED, ids)
        return [workspace.url, report.url]

    def _runs(self, entity: str) -> wr.Runset:
        """The sweep's runs, as a panel grid of the report refers to them."""
        return wr.Runset(
            entity=entity,
            project=self.project,
            name=self.name,
            filters=self.filters,
            groupby=[f"config.{ROW}"],
            pinned_columns=self._pinned_columns,
        )

    def _line(self, spec: Mapping[str, Any], y: str) -> wr.LinePlot:
        """One metric of a figure of the layout."""
        x = x_metric(spec)
        title = str(spec.get("title", spec["name"]))
        return wr.LinePlot(
            title=f"{title}. {ROOT_NOTE}" if spec["kind"] in ROOTED else title,
            x=x,
            y=[y],
            title_x=metric_info(x).title,
            title_y=metric_info(y).name,
            smoothing_type="none",
            max_runs_to_show=MOST_RUNS,
            **_over_runs(),
        )


def _over_runs() -> dict[str, Any]:
    """Options of a plot that shows the mean of each row's runs with their standard error. W&B counts runs: if some
    share an SFT or reward model, only the tables above the panels count those."""
    return {"groupby": wr.Config(ROW), "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}


def _filters(sweep: Sweep, group: str) -> expr.And:
    """Select the sweep's own runs in W&B: by group and stage, or by id if some were taken over from other groups."""
    if any(run.summary.get("same_as") for run in sweep.finished):
        ids = [f"{run.summary['stage']}-{run.summary['identity']}" for run in sweep.finished]
        return expr.And(expr.Metric("ID").isin(ids))
    stages = sorted({run.summary["stage"] for run in sweep.finished})
    job_type = expr.Metric("JobType")
    return expr.And(expr.Metric("Group") == group, job_type == stages[0] if len(stages) == 1 else job_type.isin(stages))
