"""Logs a sweep's report to W&B, as a run of its own at the end of the lineage: it uses the models of all runs."""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf.pipeline.config import instantiate, target_class
from rlhf.tracking import dashboards
from rlhf.tracking.summary import read_summary, run_id


def log_report(page: Path, folder: Path, config: DictConfig) -> None:
    """Log a report to the W&B project of its sweep's runs; nothing happens if those were not logged to W&B.

    Args:
        page: the report's `report.html`; its folder is logged as an artefact.
        folder: the sweep.
        config: the sweep's configuration.
    """
    if target_class(config.logger, "logger") is not dashboards.wandb_logger:
        return
    # 1. A W&B run whose id is determined by those of the sweep's runs.
    runs = {}
    for path in sorted(folder.glob("*/summary.json")):
        summary = read_summary(path.parent) or {}
        if "identity" in summary:
            runs[run_id(summary)] = path.parent
    name = f"report-{hashlib.sha256(' '.join(sorted(runs)).encode()).hexdigest()[:12]}"
    options: dict[str, Any] = {"id": name, "name": f"{folder.name} report", "job_type": "report", "tags": []}
    dashboard = instantiate(config.logger, "logger", **options, resume=None, save_dir=str(folder))
    # 2. The edges of the lineage.
    for run, run_folder in runs.items():
        dashboard.log_input_model(run, run_folder)
    # 3. The page, with the specifications of the sweep's boards beside it where the package for them is installed.
    if find_spec("wandb_workspaces"):
        from rlhf.report.boards import Boards

        Boards.of(folder).write(page.parent)
    dashboard.log_report(name, page)
    dashboard.close()
