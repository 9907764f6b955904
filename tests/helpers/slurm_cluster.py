"""A real SLURM on loopback: munged, slurmctld and slurmd from the distribution's packages, in one temporary folder."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire: seconds (120 by default) before a requeued job may start: not before a node that died and came
# back has received the controller's pending messages, among them "end this job"
AuthInfo=cred_expire=12,socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=5
JobRequeue=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=60 DefMemPerCPU=1500
PartitionName=high Nodes=localhost PriorityTier=10 DefMemPerCPU=500
"""


def missing_program() -> str | None:
    """The first of the required programs that is not installed."""
    sbin = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return next((program for program in PROGRAMS if shutil.which(program, path=sbin) is None), None)


class Cluster:
    """One node with two CPUs; jobs of the partition `high` preempt and requeue those of `low` after a minute."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: socket paths have at most 107 characters
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = dict(zip(("controller_port", "node_port"), free_ports(2), strict=True))
        user = os.environ.get("USER", "root") if os.getuid() else "root"
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, user=user, **ports))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        places = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self._start("munged", "--foreground", f"--key-file={self.folder}/munge.key", "--force", "--num-threads=2",
                    *(f"--{'socket' if k == 'socket' else f'{k}-file'}={v}" for k, v in places.items()))  # fmt: skip
        wait_for((self.folder / "munge.socket").exists, 10, "munged")
        self._start("slurmctld", "-D", "-i")
        self.start_node()

    def start_node(self) -> None:
        self._start("slurmd", "-D", "-N", "localhost")
        wait_for(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t"), 30, "an idle node")

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("a") as output:
            self.processes[command[0]] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def kill_node(self) -> None:
        """Kill the node's daemon and all processes on the node at once, as a power failure does.

        All are stopped before the first is killed: an `srun` that sees the daemon of its step die tells the controller,
        which keeps "kill step 0 of this job" for the dead node and kills the restarted job with it a minute later.
        Children are killed before parents: the kernel wakes a stopped process group when its last parent dies.
        """
        slurmd = self.processes.pop("slurmd")
        slurmd.send_signal(signal.SIGSTOP)
        stopped: dict[int, int] = {}
        while found := {pid: born for pid, born in self._on_the_node() if pid not in stopped}:
            for pid in found:
                _send(pid, signal.SIGSTOP)
            stopped |= found  # repeat: new processes may have started during the search
        for pid in sorted(stopped, key=lambda pid: (stopped[pid], pid), reverse=True):
            _send(pid, signal.SIGKILL)
        slurmd.kill()
        slurmd.wait()

    def _on_the_node(self) -> Iterator[tuple[int, int]]:
        """Step daemons and processes of jobs: (process id, clock tick of its start).

        They are recognised by this cluster's configuration in their environment.
        """
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment, name = (place / "environ").read_bytes(), (place / "comm").read_text().strip()
                if str(self.folder).encode() in environment and (
                    name.startswith("slurmstepd") or b"\0SLURM_JOB_ID=" in environment
                ):
                    # proc(5): field 22 of stat; field 2, a name in brackets, may contain spaces
                    yield int(place.name), int((place / "stat").read_text().rpartition(")")[2].split()[19])

    def run(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command and return its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        """Cancel all jobs, then stop the daemons."""
        self.run("scancel", "--user", self.environment.get("USER", "root"), check=False)
        wait_for(lambda: not self.run("squeue", "-h", check=False).strip(), 20, "an empty queue", strict=False)
        self.kill_node()
        for process in self.processes.values():
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(condition: Callable[[], bool], seconds: float, what: str, strict: bool = True) -> float:
    """Poll until the condition holds; return the seconds that this took. Fails after `seconds` if `strict`."""
    started = time.time()
    while time.time() - started < seconds:
        if condition():
            return time.time() - started
        time.sleep(0.2)
    assert not strict, f"no {what} after {seconds} s"
    return seconds
