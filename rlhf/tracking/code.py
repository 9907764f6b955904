"""The code that runs: its commit, and a frozen copy of it for jobs that start later."""

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from rlhf import PACKAGE, root
from rlhf.files import TORN_SECONDS

COMMIT = "COMMIT"  # a file of a frozen copy: the commit from which it was made, as the copy has no repository


def git_commit() -> str | None:
    """The commit that runs, with `+` after it if there are uncommitted changes; None if it is unknown."""
    if (root() / COMMIT).exists():
        return (root() / COMMIT).read_text(encoding="utf-8") or None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=root(),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip()


def freeze(folder: Path) -> Path:
    """Copy the package and its configuration to `folder/<digest of their content>` and return that path.

    A process with this path first in PYTHONPATH runs the code as it is now, even if the checkout changes meanwhile. A
    copy that exists already is not made again.
    """
    # 1. The files and their digest.
    sources = {"rlhf": PACKAGE, "hydra_plugins": PACKAGE.parent / "hydra_plugins"}
    sources |= {name: root() / name for name in ("conf", "experiments", "sweeps")}
    files = {
        f"{name}/{path.relative_to(source)}": path.read_bytes()
        for name, source in sources.items()
        for path in sorted(source.rglob("*"))
        if path.is_file() and not {"_root", "__pycache__"} & set(path.relative_to(source).parts)
    }
    files[COMMIT] = (git_commit() or "").encode()
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    # 2. Copy to a temporary place and rename, so that a copy is complete if it exists.
    target = folder / digest.hexdigest()[:12]
    if not target.exists():
        for torn in folder.glob(f".{target.name}.*"):  # left by a process that was killed
            if time.time() - torn.stat().st_mtime > TORN_SECONDS:
                shutil.rmtree(torn, ignore_errors=True)
        aside = folder / f".{target.name}.{os.getpid()}"
        for name, content in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(content)
        os.replace(aside, target)
    return target
