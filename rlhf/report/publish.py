"""A sweep's report as a W&B run of its own, which uses the models of all its runs: the end of the lineage."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf.pipeline.config import instantiate, target_class
from rlhf.tracking import dashboards
from rlhf.tracking.summary import read_summary, run_id


def publish(page: Path, folder: Path, config: DictConfig) -> None:
    """Log the page and its folder beside the runs of the sweep in `folder`, if those were logged to W&B."""
    if target_class(config.logger, "logger") is not dashboards.wandb_logger:
        return
    runs = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = read_summary(path.parent) or {}
        if "identity" in summary:
            runs[run_id(summary)] = path.parent
    name = f"report-{hashlib.sha256(' '.join(sorted(runs)).encode()).hexdigest()[:12]}"
    options: dict[str, Any] = {"id": name, "name": f"{folder.name} report", "job_type": "report", "tags": []}
    dashboard = instantiate(config.logger, "logger", **options, resume=None, save_dir=str(folder))
    for run, where in runs.items():
        if (where / "model").exists():
            dashboard.uses(run, where)
    if find_spec("wandb_workspaces"):
        from rlhf.report.boards import Boards

        Boards.of(folder).write(page.parent)
    dashboard.log_report(name, page)
    dashboard.close()
