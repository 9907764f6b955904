"""A made-up sweep for the tests of the report."""

from pathlib import Path

import pytest

from rlhf.report.runs import Sweep, load
from tests.helpers.made_up_sweeps import write_sweep


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep") / "table1")


@pytest.fixture(scope="module")
def sweep(sweep_folder: Path) -> Sweep:
    return load([sweep_folder])
