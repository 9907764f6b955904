"""The log of a run: what becomes of Hydra's handler where a process goes on after a run."""

import logging
from pathlib import Path

import pytest

from rlhf.pipeline.quiet import quieten
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


def test_a_library_that_logs_at_a_level_of_its_own_is_silenced(caplog: pytest.LogCaptureFixture) -> None:
    """bm25s would log a line for every page of a FActScore evaluation."""
    own = logging.getLogger("bm25s")
    quieten()
    own.setLevel(logging.DEBUG)  # as it does when it is imported
    with caplog.at_level(logging.DEBUG):
        own.debug("Building index from tokens")
        own.warning("something is wrong")
    assert [record.getMessage() for record in caplog.records] == ["something is wrong"]
