"""An evaluation of another run than the one that it lies beside is neither shown nor continued, and never lost."""

import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf.files import EVALUATIONS, METRICS, MODEL, SUMMARY, read_json, write_json, write_lines
from rlhf.pipeline.measuring import make_ready, missing_in
from rlhf.report.evaluation_shown import evaluation_shown, with_evaluation
from rlhf.report.recorded_run import RecordedRun
from rlhf.tracking import evaluations

WANTED = {0: None, 3: Path(MODEL)}
OWN: dict[str, Any] = {"identity": "ours", "evaluation": "first", "metrics": {"eval/win_rate": 0.5}, "stage": "ppo"}


@pytest.fixture(params=["ours", "theirs"])
def identity(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def measured(tmp_path: Path, identity: str) -> Path:
    """A complete evaluation of the run `identity`, beside the run `ours`, which a command asked for last."""
    write_json(tmp_path / SUMMARY, OWN)
    place = evaluations.place(tmp_path, "second")
    place.mkdir(parents=True)
    write_json(place / SUMMARY, {"identity": identity, "evaluation": "second", "metrics": {"eval/win_rate": 0.9}})
    write_lines(place / METRICS, ({"step": step, "time/evaluate": 1.0} for step in WANTED))
    evaluations.show(tmp_path, "second")
    return place


def test_it_is_shown_only_for_the_run_that_it_measured(
    measured: Path, identity: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, own = measured.parent.parent, identity == "ours"
    with caplog.at_level(logging.WARNING):
        shown = evaluations.shown_summary(run)
    assert shown is not None
    assert shown["metrics"] == {"eval/win_rate": 0.9 if own else 0.5}
    assert [record.getMessage() for record in caplog.records] == (
        [] if own else [f"{measured} measures another run (theirs) than that which is there (ours); it is ignored"]
    )


def test_a_report_says_that_it_ignores_it(measured: Path, identity: str) -> None:
    run, own = measured.parent.parent, identity == "ours"
    summary, place, missing = with_evaluation(run, OWN, None)
    assert (summary["metrics"]["eval/win_rate"], place, missing) == ((0.9, measured, "") if own else (0.5, None, ""))
    chosen = with_evaluation(run, OWN, "second")
    assert bool(chosen[2]) != own
    said = evaluation_shown([RecordedRun(run, (), "finished", summary=summary, measured=place)])
    assert [sentence for sentence in said if "ignored" in sentence] == (
        [] if own else [f"{measured} measures another run (theirs) than that which is there (ours), and is ignored."]
    )


def test_it_counts_as_not_measured_and_moves_aside(measured: Path, identity: str) -> None:
    own = identity == "ours"
    assert missing_in(measured, WANTED) == ({} if own else WANTED)
    make_ready(measured)
    assert (measured / SUMMARY).exists() == own
    moved = measured.with_name("second-of-theirs")
    assert moved.exists() != own
    if not own:
        assert read_json(moved / SUMMARY)["metrics"] == {"eval/win_rate": 0.9}
        write_json(measured / SUMMARY, read_json(moved / SUMMARY))
        make_ready(measured)
        assert measured.with_name("second-of-theirs-2").exists()


def test_a_copied_run_takes_its_evaluations_along(measured: Path, identity: str) -> None:
    """Under a new identity, those of the copied run get it, and those of others stay foreign."""
    run = measured.parent.parent
    write_json(run / SUMMARY, {**OWN, "identity": "now"})
    evaluations.rename_run(run, "ours", "now")
    assert bool(evaluations.foreign(measured)) == (identity == "theirs")


def test_an_unfinished_evaluation_belongs_to_the_run(tmp_path: Path) -> None:
    """It has no summary yet, and is continued."""
    write_json(tmp_path / SUMMARY, OWN)
    place = tmp_path / EVALUATIONS / "second"
    place.mkdir(parents=True)
    write_lines(place / METRICS, [{"step": 0, "time/evaluate": 1.0}])
    assert missing_in(place, WANTED) == {3: Path(MODEL)}
    make_ready(place)
    assert (place / METRICS).exists()
