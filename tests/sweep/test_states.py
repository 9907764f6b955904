"""The state of runs from their files and locks: what runs, what is built for it, what has stopped."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.files import PLAN, PROGRESS, SUMMARY, locks, write_json
from rlhf.sweep.plan import earlier_runs
from rlhf.sweep.states import RunState, states
from rlhf.sweep.status import view
from rlhf.tracking.run_folder import LOCK
from tests.helpers.command_line import TINY, error_sentence, run_in_process


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs/study"
    for name in ("one", "two"):
        (folder / name / ".hydra").mkdir(parents=True)
        (folder / name / ".hydra/config.yaml").write_text("stage: {name: ppo}\nppo: {steps: 40}\n")
    runs = [{"folder": name, "overrides": [f"variant={name}"]} for name in ("one", "two")]
    write_json(folder / PLAN, {"runs": runs, "jobs": 2})
    return folder


def log(run: Path, *lines: dict[str, float]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_lock_says_whether_a_run_is_under_way(sweep: Path) -> None:
    log(sweep / "one", {"step": 0, "eval/win_rate": 0.25}, {"step": 7, "ppo/reward": 1.5})
    lock = locks.acquire(sweep / "one" / LOCK, "")
    running, waiting = states(sweep)
    assert (running.state, running.doing, waiting.state) == ("running", "PPO 7/40", "waiting")
    assert running.metrics == {"win %": 25.0, "reward": 1.5}
    lock.release()
    assert states(sweep)[0].state == "begun", "the metrics are fresh, but nobody holds the lock any more"


def test_what_a_run_builds_is_named_with_its_step(sweep: Path) -> None:
    cache = sweep.parent / "cache"
    held = [locks.acquire(sweep / "one" / LOCK, ""), locks.acquire(cache / "sft-0a.lock", "")]
    log(cache / ".sft-0a.building", {"step": 0}, {"step": 12})
    assert states(sweep)[0].doing == "SFT"
    write_json(cache / ".sft-0a.building" / PROGRESS, {"steps": 25})
    assert states(sweep)[0].doing == "SFT 12/25"
    held[1].release()
    assert states(sweep)[0].doing == "preparing"
    held[0].release()


def test_a_lock_of_another_host_is_not_trusted_to_be_free(sweep: Path) -> None:
    path = sweep / "one" / LOCK
    assert locks.is_held(path) is None
    path.write_text("pid=1\nhost=elsewhere\n")
    assert locks.is_held(path) is None
    log(sweep / "one", {"step": 3})
    assert states(sweep)[0].state == "running", "by the age of its metrics"


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_the_terminal(width: int, tmp_path: Path) -> None:
    write_json(tmp_path / PLAN, {"runs": [], "jobs": 1})
    metrics = {"reward": -11.25, "win %": 100.0, "KL": 0.12}
    runs = [
        RunState(tmp_path / f"{i}", (f"variant={'long_' * 9}{i}", "replicate=1"), "running", 3, doing="PPO 123/200",
                 left=3725.0, metrics=metrics) for i in range(40)
    ]  # fmt: skip
    console = Console(width=width, height=24, record=True, file=(tmp_path / "out").open("w"))
    console.print(view(tmp_path, runs, height=24))
    rows = [line for line in console.export_text().splitlines() if line.startswith("running")]
    assert rows
    assert len(rows) < 20
    assert all(row.split()[-6:] == ["PPO", "123/200", "-11.25", "100.0", "0.12", "1:02:05"] for row in rows)


def test_a_second_sweep_in_a_folder_forgets_no_run_of_the_first(sweep: Path) -> None:
    new = [{"folder": "three", "overrides": ["variant=three"]}, {"folder": "two", "overrides": ["variant=two"]}]
    write_json(sweep / "one" / SUMMARY, {"wall_seconds": 5.0})
    write_json(sweep / PLAN, {"runs": new, "jobs": 1, "earlier": earlier_runs(sweep, new)})
    assert [run.folder.name for run in states(sweep)] == ["three", "two"]
    console = Console(width=80, record=True, file=(sweep / "out").open("w"))
    console.print(view(sweep, states(sweep)))
    assert "of earlier sweeps in this folder: 1 of 1 runs done\n" in console.export_text()
    # and a third sweep still knows those of both
    assert [run["folder"] for run in earlier_runs(sweep, [])] == ["one", "three", "two"]


@pytest.mark.long
def test_an_axis_in_hydras_own_configuration_is_one_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_in_process("-m", *TINY, "dry_run=true", "+hydra.sweeper.params.replicate='1,2'") == 0
    assert "0 of 2 runs done, 2 waiting" in capfd.readouterr().out
    assert run_in_process("-m", *TINY, "dry_run=true", "hydra.sweeper.params={replicate: '1,2'}") == 2
    said = error_sentence(capfd.readouterr().err)
    assert "hydra.sweeper.params: Hydra's own configuration has no such key; allowed: " in said
