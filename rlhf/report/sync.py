"""The `rlhf-sync` command: upload offline W&B runs and, on request, the boards of sweeps (`rlhf.report.boards`)."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import FAILURE, MISTAKE, NoRunsError, first_line, missing_package

CONNECT_SECONDS = 20  # to wait for W&B's server


def offline_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of offline W&B runs anywhere below `folders` that were not uploaded yet, the oldest first."""
    found = {path.parent for folder in folders for path in folder.rglob("offline-run-*/run-*.wandb")}
    unsent = [path for path in found if not list(path.glob("*.wandb.synced"))]

    def begun(run: Path) -> tuple[str, float]:
        # the time in a run's name is in seconds, and a small stage takes less than that
        return run.name.split("-")[2], max(file.stat().st_mtime for file in run.glob("run-*.wandb"))

    return sorted(unsent, key=begun)


def sync() -> None:
    """`rlhf-sync FOLDER … [--dry-run] [--boards]`: upload offline runs with `wandb sync`, then the boards.

    Exit codes: that of `wandb sync` if it fails; 2 if boards cannot be made as asked; 1 if W&B cannot be reached.
    """
    parser = argparse.ArgumentParser(prog="rlhf-sync", description="Upload offline W&B runs.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders that contain them, such as outputs/table1")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded")
    parser.add_argument("--boards", action="store_true", help="also make a workspace and a report of each sweep")
    options = parser.parse_args()
    runs = offline_runs(options.folders)
    code = 0
    if not runs:
        print("rlhf-sync: there is nothing to upload")
    elif options.dry_run:
        print(*runs, sep="\n")
    else:
        code = subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, runs)], check=False).returncode
    if options.boards and not code:
        code = _boards(options.folders, options.dry_run)
    raise SystemExit(code)


def _boards(folders: Sequence[Path], dry_run: bool) -> int:
    """Write the specifications of each sweep's boards and upload them unless `dry_run`; returns the exit code."""
    try:
        from rlhf.report.boards import Boards
    except ModuleNotFoundError:
        print(f"rlhf-sync: {missing_package('--boards', 'wandb-workspaces', 'dashboards')}", file=sys.stderr)
        return MISTAKE
    import wandb

    try:
        for folder in folders:
            boards = Boards.of(folder)
            print(*boards.write(folder / "report"), sep="\n")
            if not dry_run:
                entity = boards.entity or wandb.Api(timeout=CONNECT_SECONDS).default_entity
                print(*boards.push(str(entity), folder / "report"), sep="\n")
    except NoRunsError as error:
        print(f"rlhf-sync: {error}", file=sys.stderr)
        return MISTAKE
    except wandb.errors.Error as error:
        print(f"rlhf-sync: no boards were put into W&B ({first_line(error)}); try again later", file=sys.stderr)
        return MISTAKE if isinstance(error, wandb.errors.UsageError) else FAILURE
    return 0
