"""`rlhf-sync FOLDER …`: send what W&B runs wrote offline, and make the boards of a sweep."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import FAILURE, MISTAKE, NoRunsError

CONNECT_SECONDS = 20


def offline_runs(folders: Sequence[Path]) -> list[Path]:
    """The offline runs below folders that were not sent yet, the oldest first."""
    found = {path.parent for folder in folders for path in folder.rglob("offline-run-*/run-*.wandb")}
    waiting = [path for path in found if not list(path.glob("*.wandb.synced"))]
    return sorted(waiting, key=lambda path: path.name)


def sync() -> None:
    """`rlhf-sync FOLDER … [--boards]`: send what was written offline, by `wandb sync`."""

    parser = argparse.ArgumentParser(prog="rlhf-sync", description="Send offline W&B runs to the server.")
    parser.add_argument("folders", nargs="+", type=Path, help="anything above them, such as outputs/table1")
    parser.add_argument("--dry-run", action="store_true", help="say which would be sent")
    parser.add_argument("--boards", action="store_true", help="make a workspace and a report of each sweep as well")
    options = parser.parse_args()
    runs = offline_runs(options.folders)
    code = 0
    if not runs:
        print("rlhf-sync: nothing waits to be sent")
    elif options.dry_run:
        print(*runs, sep="\n")
    else:
        code = subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, runs)], check=False).returncode
    if options.boards and not code:
        code = _boards(options.folders, options.dry_run)
    raise SystemExit(code)


def _boards(folders: Sequence[Path], dry_run: bool) -> int:
    """Write the specification of each sweep's workspace and report, and put them into W&B; the exit code."""
    try:
        from rlhf.report.boards import Boards
    except ModuleNotFoundError:
        print("rlhf-sync: --boards needs the package wandb-workspaces: pip install 'rlhf[dashboards]'", file=sys.stderr)
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
        told = str(error).partition("\n")[0]
        print(f"rlhf-sync: no boards were put into W&B, later the same command does: {told}", file=sys.stderr)
        return MISTAKE if isinstance(error, wandb.errors.UsageError) else FAILURE
    return 0
