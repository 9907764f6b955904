"""The loggers of each stage of a run: `metrics.jsonl` always, and the configured one."""

from itertools import takewhile
from pathlib import Path

from lightning.pytorch.loggers import Logger

from rlhf.distributed import collectives
from rlhf.files import EVALUATIONS, METRICS, PLAN
from rlhf.pipeline import cache, members
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.config import instantiate, target_class
from rlhf.pipeline.plan import Plan
from rlhf.tracking.continuing import continue_loggers
from rlhf.tracking.dashboards import Dashboard, wandb_logger
from rlhf.tracking.metrics_file import JsonLines, read_metrics
from rlhf.tracking.overrides import in_all
from rlhf.tracking.reading import try_plan
from rlhf.tracking.seeds import without_seeds


class Loggers:
    """Makes the loggers of one stage after the other; of W&B, a stage built for the cache has a run of its own."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.dashboard: Dashboard | None = None
        self.offline = False

    def of(self, folder: Path) -> list[Logger]:
        """The loggers of the stage that works in `folder`; none in any process but the first."""
        if not collectives.is_rank_zero():
            return []
        config, own = self.plan.config.logger, folder == self.plan.folder
        lines = JsonLines(folder)
        if target_class(config, "logger") is not wandb_logger:
            built = cache.name_of(folder) != folder.name and "save_dir" in config
            place = {} if own else {"save_dir": str(folder)}
            found = [instantiate(config, "logger", **place)] if own or built else []
            continue_loggers(found, read_metrics(folder), None)  # something may be measured before the run resumes
            return [lines, *found]
        self.dashboard = self._dashboard(folder, own)
        self.offline = self.dashboard.offline
        return [lines, self.dashboard]

    def _dashboard(self, folder: Path, own: bool) -> Dashboard:
        """The W&B run of a stage, with an edge to each model that it starts from."""
        plan, needed = self.plan, list(members.needed(self.plan).values())
        stage, name, run_id = plan.stage, plan.folder.name, f"{plan.stage}-{plan.identity}"
        if folder.parent.name == EVALUATIONS:
            run_id, name, stage = f"evaluate-{plan.identity}-{folder.name}", f"{name} {folder.name}", "evaluate"
        elif not own:
            run_id = name = cache.name_of(folder)
            stage, needed = name.partition("-")[0], list(takewhile(lambda path: path.name != name, needed))
            averages = bool(members.averaged(plan)) and name == plan.reward_folder.name
            needed = [path for path in needed if averages or not path.name.startswith("reward-")]
        # "allow" continues the W&B run of an interrupted stage; None overwrites what was there
        begun = StepCheckpoints.reached(folder / "checkpoints") or (stage == "evaluate" and (folder / METRICS).exists())
        continued = "allow" if begun else None
        chosen = {"id": run_id, "name": name, "job_type": stage, "resume": continued, "save_dir": str(plan.folder)}
        if self.offline:  # W&B could not be reached for an earlier stage: do not wait for it again
            chosen["mode"] = "offline"
        dashboard = instantiate(plan.config.logger, "logger", **chosen)
        dashboard.log_hyperparams({**plan.plain, "row": _row(plan) or "PPO"})
        for path in needed:
            dashboard.log_input_model(path.name, path)
        return dashboard

    def hand_over(self, name: str, folder: Path) -> None:
        """End the W&B run of the stage just finished, if there is one, leaving its model to the next stage."""
        if self.dashboard is not None:
            self.dashboard.log_output_model(name, folder)
            self.dashboard.close()
            self.dashboard = None


def _row(plan: Plan) -> str:
    """The row of the sweep's table that the run belongs to: by the overrides that its rows do not all share."""
    own = without_seeds(plan.overrides)
    planned, _ = try_plan(plan.folder.parent / PLAN)
    rows = dict.fromkeys(without_seeds(run["overrides"]) for run in planned)
    common = in_all(rows) if own in rows else []
    return ", ".join(item for item in own if item not in common)
