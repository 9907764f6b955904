"""Sweeps: plans, repeated and failing runs, reused results, and progress."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from rlhf.files import FAILED, PLAN, SUMMARY, read_json, write_json
from rlhf.sweep.plan import parallel_jobs
from rlhf.sweep.states import progress_line, seconds_left, states
from tests.helpers.command_line import TINY
from tests.helpers.subprocess_runs import QUICK, run_in_subprocess


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants and two seeds with one failed run, which did not stop the others."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.py").write_text(
        "from pathlib import Path\n"
        "from hydra.core.hydra_config import HydraConfig\n\n\n"
        "def score(prompts, responses):\n"
        "    if Path('broken').exists() and 'seed=2' in HydraConfig.get().overrides.task:\n"
        "        raise RuntimeError('the moon is full')\n"
        "    return [len(response) / 100 for response in responses]\n"
    )
    (folder / "broken").touch()
    return folder


ARGUMENTS = ["-m", *QUICK, "name=study", "scorer=function", "scorer.function=mine.score", "ppo.steps=1",
             "ppo.eval_every=1"]  # fmt: skip


def sweep(folder: Path, *arguments: str, code: int = 0) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        seeds = [] if any(argument.startswith("seed=") for argument in arguments) else ["seed=1,2"]
        return run_in_subprocess(folder, *ARGUMENTS, *seeds, *arguments, code=code)


@pytest.mark.long
def test_a_failed_run_is_named_and_the_next_sweep_makes_only_what_is_missing(workplace: Path) -> None:
    axis = "variant=lora_kl,lora_none"
    listing = sweep(workplace, axis, "dry_run=true")
    assert listing.count("missing  ") == 4
    said = sweep(workplace, axis, code=1)
    assert "the moon is full" in said
    assert "2 of 4 runs done, 2 failed" in said
    study = workplace / "outputs/study"
    done = sorted(path.parent.name for path in study.glob(f"*/{SUMMARY}"))
    assert ["seed-1" in name for name in done] == [True, True]
    assert len(list(study.glob(f"*/{FAILED}"))) == 2
    assert (study / "report/report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in study.glob(f"*/{SUMMARY}")}
    (workplace / "broken").unlink()
    assert sweep(workplace, axis, "dry_run=true").count("missing  ") == 2
    said = sweep(workplace, axis)
    assert "4 of 4 runs done" in said
    assert not list(study.glob(f"*/{FAILED}"))
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    # the same configuration under another name is the same run
    said = sweep(workplace, "variant=lora_none", "name=other")
    assert said.count("taken over from it") == 2
    taken = next((workplace / "outputs/other").glob("*seed-1*"))
    origin = next(study.glob("*seed-1*lora_none*"))
    assert (taken / "metrics.jsonl").read_bytes() == (origin / "metrics.jsonl").read_bytes()
    assert (taken / read_json(taken / SUMMARY)["same_as"]).resolve() == origin.resolve()
    assert (taken / "model/adapter_model.safetensors").exists()
    assert read_json(taken / SUMMARY)["config"]["name"] == "other"  # another name, for another layout of the report
    # one more seed means one more run per variant
    assert sweep(workplace, "variant=lora_none", "seed=1,2,3", "dry_run=true").count("missing  ") == 1


@pytest.mark.long
@pytest.mark.skipif("RLHF_KILLS" not in os.environ, reason="RLHF_KILLS is not set")
def test_a_sweep_that_was_killed_ends_in_the_same_tables(tmp_path: Path) -> None:
    """The command and its jobs get SIGKILL at random moments, twice; then the command runs once more."""
    random = Random(0)
    command = ["-m", *TINY, "name=study", "variant=lora_kl,full_none", "seed=1,2", "hydra/launcher=joblib"]
    folders = {name: tmp_path / name for name in ("undisturbed", "killed")}
    for folder in folders.values():
        folder.mkdir()
    run_in_subprocess(folders["undisturbed"], *command)
    for begun in (1, 3):  # so many of the four runs
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", *command], cwd=folders["killed"], start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while len(list(folders["killed"].glob("outputs/study/*/metrics.jsonl"))) < begun:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(random.uniform(0, 2))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = run_in_subprocess(folders["killed"], *command)
    assert "4 of 4 runs done" in said
    reports = [folder / "outputs/study/report" for folder in folders.values()]
    for name in ("table.csv", "table.md", "gains.csv"):
        assert (reports[0] / name).read_text() == (reports[1] / name).read_text()


def make_plan(folder: Path, done: int, running: int, failed: int, waiting: int) -> None:
    names = [f"run-{i}" for i in range(done + running + failed + waiting)]
    write_json(folder / PLAN, {"runs": [{"folder": n, "overrides": [f"seed={n[4:]}"]} for n in names], "jobs": 2})
    for i, name in enumerate(names[: done + running + failed]):
        (folder / name).mkdir()
        if i < done:
            write_json(folder / name / SUMMARY, {"wall_seconds": 60.0})
        elif i < done + running:
            (folder / name / "metrics.jsonl").write_text(json.dumps({"step": 7}) + "\n")
        else:
            write_json(folder / name / FAILED, {"error": "no memory"})


def test_states_and_remaining_time_are_reported(tmp_path: Path) -> None:
    make_plan(tmp_path, done=2, running=1, failed=1, waiting=3)
    runs = states(tmp_path)
    assert [run.state for run in runs] == ["done"] * 2 + ["running"] + ["failed"] + ["waiting"] * 3
    assert runs[2].step == 7
    assert runs[3].reason == "no memory"
    assert seconds_left(runs, 2) == pytest.approx(60 * 4 / 2)
    assert progress_line(runs, 2) == "2 of 7 runs done, 1 running, 3 waiting, 1 failed; about 2 min left"
    assert progress_line(runs, 8).endswith("; less than a minute left")
    old = time.time() - 3600
    os.utime(tmp_path / "run-2/metrics.jsonl", (old, old))
    assert states(tmp_path)[2].state == "begun"


def test_the_status_command_prints_all_runs(tmp_path: Path) -> None:
    make_plan(tmp_path, done=2, running=0, failed=1, waiting=0)
    code = "from rlhf.sweep.status import status; status()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), "--watch"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "2 of 3 runs done, 1 failed" in done.stdout
    assert "no memory" in done.stdout
    empty = subprocess.run([sys.executable, "-c", code, str(tmp_path / "nope")], capture_output=True, text=True)
    assert empty.returncode == 2
    assert "not the folder of a sweep" in empty.stderr


@pytest.mark.parametrize(("n_jobs", "expected"), [(3, 3), (-1, os.cpu_count()), (None, 1)])
def test_the_number_of_parallel_jobs_follows_from_the_launcher(n_jobs: int | None, expected: int) -> None:
    from omegaconf import OmegaConf

    assert parallel_jobs(OmegaConf.create({"n_jobs": n_jobs})) == expected
