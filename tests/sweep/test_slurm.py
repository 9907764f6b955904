"""Sweeps on a real SLURM (one node on loopback): preemption, time limits, a node that dies, and a failing job."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import ConfigError
from rlhf.files import read_json, read_lines
from rlhf.sweep import slurm
from rlhf.tracking.code import freeze
from tests.helpers.run_results import assert_identical, collect_run_results
from tests.helpers.slurm_cluster import Cluster, missing_program, wait_for
from tests.helpers.subprocess_runs import QUICK

SEEDS = (1, 2)
# a scorer that waits where the test wants it to, or kills its process as the kernel does when memory is short
MINE = """
import os, signal, time
from pathlib import Path
from hydra.core.hydra_config import HydraConfig

seed = next(word[5:] for word in HydraConfig.get().overrides.task if word.startswith("seed="))
if seed == "3":
    os.kill(os.getpid(), signal.SIGKILL)


def score(prompts, responses):
    while Path(f"hold-{seed}").exists():
        time.sleep(0.05)
    return [len(response) / 100 for response in responses]
"""
SHORT = [word for word in QUICK if "hidden_size" not in word]  # the folder of a run has its name, not cut off
SWEEP = [
    "-m", *SHORT, "scorer=function", "scorer.function=mine.score", "ppo.steps=10", "ppo.eval_every=5",
    "ppo.checkpoint_every=4", "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.mem_gb=1",
    "hydra.launcher.timeout_min=10", "hydra.launcher.signal_delay_s=115", "output_dir=outputs",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if absent := missing_program():
        pytest.skip(f"{absent} is not installed (apt-get install slurm-wlm munge)")
    if os.getuid() != 0:
        pytest.skip("slurmd must run as root")
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Sweep:
    """A folder for the command, which is run from a copy of the checkout."""

    def __init__(self, cluster: Cluster, folder: Path, *overrides: str):
        self.cluster, self.folder, self.study = cluster, folder, folder / "outputs/rlhf"
        (folder / "mine.py").write_text(MINE)
        self.checkout = freeze(folder / "checkout")
        environment = {**cluster.environment, "PYTHONPATH": str(self.checkout)}
        command = [sys.executable, "-m", "rlhf", *SWEEP, *overrides]
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)

    def run(self, seed: int) -> Path:
        return next(self.study.glob(f"*_seed-{seed}"), self.study / "not-yet")

    def job(self, seed: int) -> dict[str, Any]:
        note = self.run(seed) / "job.json"
        return read_json(note) if note.exists() else {}

    def state(self, seed: int) -> str:
        return self.cluster.run("squeue", "-h", "-j", self.job(seed)["job"], "-o", "%T").strip()

    def log(self, seed: int) -> str:
        return (self.run(seed) / "slurm.log").read_text()

    def step(self, seed: int) -> int:
        return max((line["step"] for line in read_lines(self.run(seed) / "metrics.jsonl")), default=-1)

    def hold(self, seed: int, hold: bool = True) -> None:
        (self.folder / f"hold-{seed}").touch() if hold else (self.folder / f"hold-{seed}").unlink()

    def hold_at(self, step: int) -> None:
        """Let both runs reach this step and wait within the next one."""
        left = set(SEEDS)

        def held() -> bool:
            for seed in [seed for seed in left if self.step(seed) >= step]:
                self.hold(seed)
                left.remove(seed)
            return not left

        wait_for(held, 240, f"step {step}: {self.said()}")

    def said(self) -> str:
        return (self.folder / "output").read_text()

    def end(self, code: int = 0) -> str:
        try:
            assert self.process.wait(300) == code, self.said()
        finally:
            self.process.kill()
        return self.said()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Results of a sweep with three jobs, one of which is killed at once."""
    sweep = Sweep(cluster, tmp_path_factory.mktemp("undisturbed"), "seed=3,1,2")
    sweep.end(code=1)
    return sweep


@pytest.mark.long
def test_a_job_that_is_killed_is_named_and_keeps_the_others(undisturbed: Sweep) -> None:
    said = undisturbed.said()
    assert "2 of 3 runs done, 1 failed" in said
    assert "SLURM: FAILED, exit code 137" in read_json(undisturbed.run(3) / "failed.json")["error"]
    assert (undisturbed.study / "report/report.html").exists()


@pytest.mark.long
def test_a_run_names_its_job_and_holds_its_log(undisturbed: Sweep) -> None:
    job = undisturbed.job(1)
    assert job.items() >= {"node": "localhost", "restarts": 0}.items()
    assert Path(job["log"]) == (undisturbed.run(1) / "slurm.log").resolve()
    assert "continuing" not in undisturbed.log(1)
    name = undisturbed.cluster.run("scontrol", "-o", "show", "job", job["job"]).partition("JobName=")[2]
    assert name.startswith(f"rlhf/{undisturbed.run(1).name} ")
    assert read_json(undisturbed.run(1) / "summary.json")["git_commit"] == (undisturbed.checkout / "COMMIT").read_text()


@pytest.mark.long
def test_preempted_out_of_time_and_on_a_lost_node_runs_end_with_the_same_bits(
    cluster: Cluster, undisturbed: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed.folder / "outputs/cache", tmp_path / "outputs/cache", ignore=lambda *_: ["runs"])
    sweep = Sweep(cluster, tmp_path, "seed=1,2")
    seen = {}
    sweep.hold_at(2)
    # the checkout changes here: restarted jobs must not notice
    (sweep.checkout / "rlhf/ppo.py").write_text("raise RuntimeError('not the code that was submitted')\n")
    (sweep.checkout / "conf/ppo/default.yaml").write_text("lr: 1.0\n")
    said = status(cluster, sweep.study)
    assert said.count("running") == 3
    assert "localhost" in said

    # seed 2 reaches its time limit
    minutes = (
        elapsed_minutes(cluster, sweep.job(2)["job"]) + 2
    )  # the signal comes 115 s before, and SLURM checks every 30 s
    cluster.run("scontrol", "update", f"JobId={sweep.job(2)['job']}", f"TimeLimit={minutes}")
    seen["time limit: signal"] = wait_for(lambda: "SIGUSR1: finishing" in sweep.log(2), 90, "signal of the time limit")
    sweep.hold(2, False)
    seen["time limit: queued again"] = wait_for(lambda: sweep.state(2) == "PENDING", 60, "requeue")
    cluster.run("scontrol", "update", f"JobId={sweep.job(2)['job']}", "TimeLimit=10")
    assert sweep.state(1) == "RUNNING"

    # seed 1 is preempted by a job with a higher priority
    cluster.run("sbatch", "-p", "high", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 1")
    seen["preemption: signal"] = wait_for(lambda: "SIGTERM: finishing" in sweep.log(1), 60, "preemption")
    sweep.hold(1, False)
    seen["preemption: queued again"] = wait_for(lambda: sweep.state(1) == "PENDING", 60, "requeue")
    seen["both: running again"] = wait_for(
        lambda: all(sweep.job(seed)["restarts"] == 1 for seed in SEEDS), 120, "second start"
    )

    # the node dies with both jobs
    sweep.hold_at(6)
    assert all(sweep.step(seed) < 10 for seed in SEEDS)
    assert all("continuing from step" in sweep.log(seed) for seed in SEEDS)
    cluster.kill_node()
    seen["node: found down"] = wait_for(
        lambda: "down" in cluster.run("sinfo", "-h", "-o", "%t"), 60, "a node that is down"
    )
    for seed in SEEDS:
        sweep.hold(seed, False)
    cluster.start_node()
    seen["node: running again"] = wait_for(
        lambda: all(sweep.job(seed)["restarts"] == 2 for seed in SEEDS), 120, "third start"
    )
    sweep.end()
    with capsys.disabled():
        print("\nseconds:", json.dumps({key: round(value, 1) for key, value in seen.items()}))
    assert_identical(collect_run_results(map(sweep.run, SEEDS)), collect_run_results(map(undisturbed.run, SEEDS)))


def elapsed_minutes(cluster: Cluster, job: str) -> int:
    """Whole minutes since the start of the job."""
    hours, minutes, _ = cluster.run("scontrol", "-o", "show", "job", job).partition("RunTime=")[2].split()[0].split(":")
    return 60 * int(hours) + int(minutes)


def status(cluster: Cluster, study: Path) -> str:
    """The output of `rlhf-status`."""
    code = "from rlhf.sweep.status import status; status()"
    command = [sys.executable, "-c", code, str(study)]
    environment = {**cluster.environment, "COLUMNS": "400"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_without_slurm_nothing_is_made(command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    code, _, said = command(*SWEEP, "seed=1")
    assert code == 2
    assert said == "rlhf: hydra/launcher=slurm needs a login node of a SLURM cluster, but there is no sbatch here\n"
    assert not (tmp_path / "outputs").exists()


def test_without_the_extra_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None; "
        "sys.modules['submitit'] = None; from rlhf.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *SWEEP, "seed=1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "rlhf: hydra/launcher=slurm needs the package hydra-submitit-launcher: "
        "pip install -e '.[slurm]' in the checkout\n"
    )
    assert not (tmp_path / "outputs").exists()


@pytest.mark.long
def test_without_multirun_nothing_runs_on_the_login_node(tmp_path: Path) -> None:
    arguments = [word for word in SWEEP if word != "-m"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "hydra/launcher=slurm submits sweeps" in done.stderr


def test_a_profile_chooses_the_launcher_over_that_of_an_experiment() -> None:
    command = [sys.executable, "-m", "rlhf", "--cfg", "hydra", "-p", "hydra.launcher"]
    overrides = ["experiments=table1", "cluster=example", "hydra.launcher.timeout_min=7"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, check=True)
    assert "SlurmLauncher" in done.stdout
    assert "partition: gpu\n" in done.stdout
    assert "timeout_min: 7\n" in done.stdout


def test_a_signal_before_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="signal_delay_s=300 must be below the time limit"):
        slurm.check_cluster(timeout_min=5, signal_delay_s=300)


@pytest.mark.parametrize(
    "arguments",
    [
        ["hydra.launcher.tasks_per_node=2"],
        ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2", "trainer=ddp", "trainer.devices=2"],
        ["hydra.launcher.tasks_per_node=4", "hydra.launcher.gpus_per_node=2", "trainer=ddp"],
        ["trainer=ddp", "trainer.devices=2", "trainer.num_nodes=2"],
        ["hydra.launcher.tasks_per_node=4", "trainer=ddp", "trainer.devices=2,4"],
    ],
)
def test_tasks_that_do_not_fit_the_trainer_are_refused_at_submission(
    arguments: list[str], command: Callable, tmp_path: Path
) -> None:
    code, _, said = command(*SWEEP, "seed=1", *arguments)
    assert code == 2
    assert len(said.splitlines()) == 1
    assert "does not fit trainer.num_nodes=" in said
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("launcher", "trainer"),
    [
        ({}, {}),
        ({}, {"devices": 4}),
        ({"tasks_per_node": 4}, {"devices": 4}),
        ({"tasks_per_node": 2}, {"devices": [0, 3]}),
        ({"nodes": 2, "tasks_per_node": 4, "gpus_per_node": "h100:4"}, {"devices": "auto", "num_nodes": 2}),
        ({"nodes": 2, "tasks_per_node": 4}, {"devices": "auto", "num_nodes": 2}),
    ],
)
def test_tasks_that_fit_the_trainer_are_accepted(launcher: dict, trainer: dict) -> None:
    slurm.check_tasks({"nodes": 1, "tasks_per_node": 1, "gpus_per_node": None, **launcher}, trainer)
