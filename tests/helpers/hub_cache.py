"""A repository of the Hub as `huggingface_hub` keeps it on this machine."""

import shutil
from pathlib import Path


def on_the_hub(cache: Path, name: str, commits: dict[str, Path]) -> None:
    """Put a repository into a cache: a snapshot for each commit; `v1` is the first of them and `main` the last."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit, folder in commits.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)
    (repository / "refs/v1").write_text(next(iter(commits)))
