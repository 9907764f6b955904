"""SLURM as its commands show it: the queue, what became of a job, putting one back.

Nothing here waits for torch: the launcher and `rlhf-status` run on a login node.
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
JOB = "job.json"  # in a run's folder: its last job, where its log is, and since it began, on which node
PATIENCE_SECONDS = 60  # for a command of SLURM: controllers are slow when they are busy


@dataclass(frozen=True)
class Queued:
    """A job in the queue: SLURM's state (PENDING, RUNNING, COMPLETING …), why it waits, where it runs."""

    state: str
    reason: str
    node: str


def check(timeout_min: int, signal_delay_s: int) -> None:
    """Raise a ConfigError where there is no SLURM to submit to, or where a job would be told to stop as it starts."""
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
    """Raise a ConfigError where a job would have other tasks than the run in it has processes.

    A job of one task starts the processes of its node itself; of several, each task is a process.
    """
    nodes, tasks, wanted = launcher["nodes"], launcher["tasks_per_node"], trainer.get("num_nodes", 1)
    gpus = launcher.get("gpus_per_node")
    here = processes_per_node(trainer, int(str(gpus).rpartition(":")[2]) if gpus else None)
    if (nodes, tasks, wanted) != (1, 1, 1) and (nodes != wanted or here not in (tasks, None)):
        raise ConfigError(
            f"hydra.launcher.nodes={nodes} with hydra.launcher.tasks_per_node={tasks} does not fit trainer.num_nodes="
            f"{wanted} with trainer.devices={trainer.get('devices', 1)}; allowed: the same numbers, or one node with "
            "one task, which starts the processes itself"
        )


def queue(jobs: Iterable[str]) -> dict[str, Queued] | None:
    """Those of the jobs that are in the queue; None when SLURM does not answer.

    Jobs are named as SLURM does: `12`, or `12_3` for a task of an array.
    """
    wanted = set(jobs)
    arrays = sorted({job.partition("_")[0] for job in wanted})
    if not wanted:
        return {}
    done = _run("squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={','.join(arrays)}")
    if done is None or (done.returncode and "Invalid job id" not in done.stderr):
        return None
    rows = (line.strip().split("|") for line in done.stdout.splitlines() if line.count("|") == 3)
    return {job: Queued(state, reason, node) for job, state, reason, node in rows if job in wanted}


def fate(job: str) -> str | None:
    """What became of a job that left the queue, in a phrase: TIMEOUT, NODE_FAIL, OUT_OF_MEMORY … None if SLURM forgot.

    The controller remembers a job for some minutes (MinJobAge); accounting, where a cluster has it, for ever.
    """
    done = _run("scontrol", "--oneliner", "show", "job", job)
    if done is not None and done.returncode == 0:
        found = {key: _field(done.stdout, key) for key in ("JobState", "ExitCode", "NodeList", "Reason")}
        return _phrase(job, found["JobState"], found["ExitCode"], found["NodeList"], found["Reason"])
    done = _run("sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode,NodeList", "-j", job)
    if done is not None and done.returncode == 0 and done.stdout.strip():
        state, code, node = done.stdout.strip().splitlines()[-1].split("|")
        return _phrase(job, state, code, node, "")
    return None


def _field(text: str, key: str) -> str:
    match = re.search(rf"\b{key}=(\S*)", text)
    return match[1] if match else ""


def _phrase(job: str, state: str, code: str, node: str, reason: str) -> str:
    parts = [f"SLURM: {state}"]
    if code not in ("", "0:0"):
        parts.append(
            f"exit code {code.partition(':')[0]}" if code.endswith(":0") else f"signal {code.partition(':')[2]}"
        )
    if reason not in ("", "None", "NonZeroExitCode"):
        parts.append(reason)
    where = f" on {node}" if node not in ("", "(null)", "None assigned") else ""
    return f"{', '.join(parts)} (job {job}{where})"


def this_job() -> str:
    """The name of the job that this process belongs to."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def restarts() -> int:
    """How often SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def put_back(most: int) -> bool:
    """Put this job back in the queue, unless it was started again `most` times already; whether it is.

    Only a job that SLURM counts as running, or ends for its time limit: one that was cancelled stays so, one that SLURM
    itself puts back needs no help.
    """
    job = this_job()
    queued = (queue([job]) or {}).get(job)
    if queued is None or (queued.state != "RUNNING" and queued.reason != "TimeLimit"):
        return False
    if restarts() >= most:
        log.error("job %s was started again %d times: not put back (hydra.launcher.max_num_timeout)", job, restarts())
        return False
    done = _run("scontrol", "requeue", job)
    if done is None or done.returncode:
        log.error(
            "job %s cannot be put back (%s): the same command continues", job, done.stderr.strip() if done else ""
        )
        return False
    return True


def note_submitted(folder: Path, job: str, output: Path) -> None:
    """Leave the job's name and a link to its log in the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JOB, {"job": job, "log": str(output), "submitted": time.time()})
    link = folder / "slurm.log"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(output, folder))


def note_started(folder: Path) -> None:
    """Add where and since when the job runs; call it by the run's name in the queue, too."""
    note = read_json(folder / JOB) if (folder / JOB).exists() else {}
    start = {"node": os.environ.get("SLURM_JOB_NODELIST", ""), "started": time.time(), "restarts": restarts()}
    write_json(folder / JOB, {**note, "job": this_job(), **start})
    _run("scontrol", "update", f"JobId={this_job()}", f"JobName={folder.parent.name}/{folder.name}")


def job_of(folder: Path) -> dict[str, Any]:
    """A run's `job.json`, {} where no cluster ran it."""
    return read_json(folder / JOB) if (folder / JOB).exists() else {}


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.debug("%s: %s", command[0], error)
        return None
