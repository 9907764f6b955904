"""Each test of a data set has a cache folder of its own."""

from pathlib import Path

import datasets
import pytest


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which `datasets` caches the Arrow files of this test."""
    folder = tmp_path / "cache"
    folder.mkdir()
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder
