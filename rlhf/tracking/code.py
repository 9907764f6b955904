"""Which code runs: its commit, and a frozen copy of it for jobs that start later."""

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from rlhf import PACKAGE, root
from rlhf.files import TORN_SECONDS

COMMIT = "COMMIT"  # in a frozen copy, which is no checkout: the commit it was made of


def git_commit() -> str | None:
    """The commit of the checkout (with `+` when it is changed), None outside one."""
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
    """Copy package and configuration as they are now to `folder/<digest>`, unless they are there; returns that folder.

    With it first in PYTHONPATH a process runs this code, whatever becomes of the checkout.
    """
    places = {"rlhf": PACKAGE, "hydra_plugins": PACKAGE.parent / "hydra_plugins"}
    places |= {name: root() / name for name in ("conf", "experiments", "sweeps")}
    files = {
        f"{name}/{path.relative_to(place)}": path.read_bytes()
        for name, place in places.items()
        for path in sorted(place.rglob("*"))
        if path.is_file() and not {"_root", "__pycache__"} & set(path.relative_to(place).parts)
    }
    files[COMMIT] = (git_commit() or "").encode()
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    target = folder / digest.hexdigest()[:12]
    if not target.exists():
        for torn in folder.glob(f".{target.name}.*"):  # of a process that was killed
            if time.time() - torn.stat().st_mtime > TORN_SECONDS:
                shutil.rmtree(torn, ignore_errors=True)
        aside = folder / f".{target.name}.{os.getpid()}"
        for name, content in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(content)
        os.replace(aside, target)
    return target
