"""The log of a run: what becomes of Hydra's handler where a process goes on after a run."""

import logging
from pathlib import Path

import pytest

from tests.helpers.command_line import TINY, run_in_process


@pytest.mark.slow
def test_a_run_in_process_leaves_the_log_as_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = logging.getLogger().handlers[:], logging.getLogger().level
    assert run_in_process(*TINY, "stage=sft", "name=moved") == 0
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
    (log,) = Path("outputs").glob("**/*.log")
    log.parent.rename("elsewhere")
    logging.getLogger().warning("said when the folder of the log is gone")
