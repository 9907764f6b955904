"""SLURM's commands (squeue, scontrol, sacct), and the `job.json` that connects a run's folder with its job.

The launcher and `rlhf-status` run this on a login node, so torch is not imported here.
"""

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.distributed.rank import processes_per_node
from rlhf.errors import ConfigError
from rlhf.files import read_json, write_json

log = logging.getLogger(__name__)
JOB = "job.json"  # in a run's folder: name and log of its last job; node and start time once the job runs
COMMAND_TIMEOUT_SECONDS = 60  # a busy SLURM controller is slow to answer


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue: SLURM's state (PENDING, RUNNING, COMPLETING …), why it is pending, and its node."""

    state: str
    reason: str
    node: str


# -- checks before submission ----------------------------------------------------------------------------------------


def check_cluster(timeout_min: int, signal_delay_s: int) -> None:
    """Check that SLURM's commands are here, and that jobs have time to work before they are signalled to stop.

    Args:
        timeout_min: time limit of a job, in minutes.
        signal_delay_s: how long before the limit SLURM sends the signal, in seconds.

    Raises:
        ConfigError: a command is missing, or the signal would come as the job starts.
    """
    if signal_delay_s >= 60 * timeout_min:
        raise ConfigError(
            f"hydra.launcher.signal_delay_s={signal_delay_s} must be below the time limit, "
            f"hydra.launcher.timeout_min={timeout_min} minutes"
        )
    absent = [command for command in ("sbatch", "squeue", "scontrol") if shutil.which(command) is None]
    if absent:
        raise ConfigError(
            f"hydra/launcher=slurm needs a login node of a SLURM cluster, but there is no {absent[0]} here"
        )


def check_tasks(launcher: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Check that the tasks of a job fit the processes of its run.

    Each task is a process, except that a job of a single task starts the processes of its node itself.

    Raises:
        ConfigError: nodes or tasks per node differ from the trainer's nodes or processes per node.
    """
    nodes, tasks, num_nodes = launcher["nodes"], launcher["tasks_per_node"], trainer.get("num_nodes", 1)
    gpus = launcher.get("gpus_per_node")  # a number, or type:number
    processes = processes_per_node(trainer, int(str(gpus).rpartition(":")[2]) if gpus else None)
    if (nodes, tasks, num_nodes) != (1, 1, 1) and (nodes != num_nodes or processes not in (tasks, None)):
        raise ConfigError(
            f"hydra.launcher.nodes={nodes} with hydra.launcher.tasks_per_node={tasks} does not fit trainer.num_nodes="
            f"{num_nodes} with trainer.devices={trainer.get('devices', 1)}; allowed: the same numbers, or one node "
            "with one task, which starts the processes itself"
        )


# -- queue and accounting --------------------------------------------------------------------------------------------


def squeue(jobs: Iterable[str]) -> dict[str, QueuedJob] | None:
    """Which of the jobs are in SLURM's queue.

    Args:
        jobs: SLURM's names: `12`, or `12_3` for a task of an array.

    Returns:
        The queued ones by name; None if SLURM does not answer, in which case nothing is known.
    """
    names = set(jobs)
    arrays = sorted({name.partition("_")[0] for name in names})
    if not names:
        return {}
    done = _run("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={','.join(arrays)}")
    # squeue fails if it has forgotten all of the jobs, which means that none is queued
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    rows = (line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 3)
    return {job: QueuedJob(state, reason, node) for job, state, reason, node in rows if job in names}


def end_reason(job: str) -> str | None:
    """How a job ended that has left the queue: `SLURM: TIMEOUT (job 12_3 on node7)`, NODE_FAIL, OUT_OF_MEMORY …

    None if SLURM has no record of it. The controller keeps one for some minutes (MinJobAge); the accounting database,
    which not every cluster has, keeps it for good.
    """
    done = _run("scontrol", "--oneliner", "show", "job", job)
    if done is not None and done.returncode == 0:
        return _phrase(job, *(_field(done.stdout, key) for key in ("JobState", "ExitCode", "NodeList", "Reason")))
    done = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode,NodeList", "-j", job)
    if done is not None and done.returncode == 0 and done.stdout.strip():
        state, code, node = done.stdout.strip().splitlines()[-1].split("|")
        return _phrase(job, state, code, node, "")
    return None


def _field(text: str, key: str) -> str:
    """The value of `key` in the `key=value` pairs that `scontrol show job` prints."""
    match = re.search(rf"\b{key}=(\S*)", text)
    return match[1] if match else ""


def _phrase(job: str, state: str, code: str, node: str, reason: str) -> str:
    """State, exit code or signal (SLURM's `code` is `exit:signal`) and reason of a job, without empty parts."""
    parts = [f"SLURM: {state}"]
    if code not in ("", "0:0"):
        parts.append(
            f"exit code {code.partition(':')[0]}" if code.endswith(":0") else f"signal {code.partition(':')[2]}"
        )
    if reason not in ("", "None", "NonZeroExitCode"):
        parts.append(reason)
    where = f" on {node}" if node not in ("", "(null)", "None assigned") else ""
    return f"{', '.join(parts)} (job {job}{where})"


# -- inside of a job -------------------------------------------------------------------------------------------------


def this_job() -> str:
    """SLURM's name of the job that this process belongs to."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def restart_count() -> int:
    """How often SLURM has requeued and started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def requeue(max_restarts: int) -> bool:
    """Put this job back into the queue, unless it was restarted `max_restarts` times already.

    Only jobs that are running, or are ended for their time limit, are requeued: a job that was cancelled stays
    cancelled, and SLURM requeues a preempted job itself.

    Returns:
        Whether the job was requeued here.
    """
    job = this_job()
    queued = (squeue([job]) or {}).get(job)
    if queued is None or (queued.state != "RUNNING" and queued.reason != "TimeLimit"):
        return False
    if restart_count() >= max_restarts:
        log.error("job %s was restarted %d times: not requeued (hydra.launcher.max_num_timeout)", job, restart_count())
        return False
    done = _run("scontrol", "requeue", job)
    if done is None or done.returncode:
        reason = done.stderr.strip() if done else ""
        log.error("job %s cannot be requeued (%s): the same command continues", job, reason)
        return False
    return True


# -- job.json --------------------------------------------------------------------------------------------------------


def record_submission(folder: Path, job: str, output: Path) -> None:
    """Write the job's name into a run's folder, with a link `slurm.log` to the job's output."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JOB, {"job": job, "log": str(output), "submitted": time.time()})
    link = folder / "slurm.log"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(output, folder))


def record_start(folder: Path) -> None:
    """Add node and start time to a run's `job.json`, and rename the job in the queue to `sweep/run`."""
    start = {"node": os.environ.get("SLURM_JOB_NODELIST", ""), "started": time.time(), "restarts": restart_count()}
    write_json(folder / JOB, {**read_job(folder), "job": this_job(), **start})
    _run("scontrol", "update", f"JobId={this_job()}", f"JobName={folder.parent.name}/{folder.name}")


def read_job(folder: Path) -> dict[str, Any]:
    """The content of a run's `job.json`; empty if no job was submitted for it."""
    return read_json(folder / JOB) if (folder / JOB).exists() else {}


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Run a command of SLURM; None if it is not installed or does not answer in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", command[0], error)
        return None
