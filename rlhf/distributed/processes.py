"""How several processes come to work on one run: started by torchrun or srun, or here by `launch`."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from rlhf.distributed import lockstep
from rlhf.distributed.cores import available_cores
from rlhf.distributed.rank import processes_per_node
from rlhf.distributed.strategies import Sharded

# Rank 0 may wait for hours for another run's lock. No shorter timeout is needed against a process that dies, because
# its launcher ends the others.
TIMEOUT = timedelta(days=1)
GRACE_SECONDS = 20  # for the other processes to exit by themselves after one has failed
LAUNCHER_PID = "RLHF_LAUNCHER"  # environment variable
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # finish the step, save, exit
_current: list[ClusterEnvironment] = []  # the environment of the process group that this process is in


def local_world_size(trainer: Mapping[str, Any]) -> int:
    """Number of processes per node that a `trainer` configuration asks for, on a node with the GPUs of this one."""
    return processes_per_node(trainer, torch.cuda.device_count()) or 1


def num_shards(trainer: Mapping[str, Any]) -> int:
    """Number of processes over which a `trainer` configuration shards the base (1: each process holds all of it)."""
    strategy = trainer.get("strategy")
    sharded = isinstance(strategy, Mapping) and strategy.get("_target_") == f"{Sharded.__module__}.{Sharded.__name__}"
    return local_world_size(trainer) * trainer.get("num_nodes", 1) if sharded else 1


def cluster_environment() -> ClusterEnvironment | None:
    """Lightning's view of what started this process as one of several: torchrun, srun or `launch`.

    None in a run of one process.
    """
    if _current:  # Lightning deletes the environment variables at the end of a stage
        return _current[-1]
    found: ClusterEnvironment | None = None
    if TorchElasticEnvironment.detect():
        found = TorchElasticEnvironment()
    elif "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        found = LightningEnvironment()
        found.set_world_size(int(os.environ["WORLD_SIZE"]))
        found.set_global_rank(int(os.environ["RANK"]))
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and SLURMEnvironment.detect():
        found = SLURMEnvironment(auto_requeue=False)
    return found if found is not None and found.world_size() > 1 else None


@contextmanager
def process_group() -> Iterator[None]:
    """Initialise torch's default process group for the duration of the block, if there are several processes."""
    place = cluster_environment()
    if place is None or dist.is_initialized():
        yield
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.main_address, str(place.main_port)
    # objects and counts travel over gloo, gradients on a GPU over nccl
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank())
    dist.init_process_group(backend, timeout=TIMEOUT, rank=place.global_rank(), world_size=place.world_size())
    _current.append(place)
    try:
        yield
    finally:
        _current.pop()
        lockstep.disable()
        dist.destroy_process_group()


def launcher_died() -> bool:
    """Whether this process was started by `launch` in a process that has ended since."""
    return LAUNCHER_PID in os.environ and os.getppid() != int(os.environ[LAUNCHER_PID])


def launch(processes: int, config: Path) -> int:
    """Start `python -m rlhf.worker CONFIG` in `processes` processes, forward signals to them and wait for their end.

    torchrun is not used because it kills processes that have not exited 30 seconds after a signal, which is too early
    in a long step, and does not forward SIGUSR1.

    Returns:
        The exit code of the process that failed first; 0 if none failed.
    """
    # 1. a free port for the rendezvous
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # 2. the processes, each with its share of the cores
    threads = str(max(1, available_cores() // processes))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, LAUNCHER_PID: str(os.getpid())}
    environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "rlhf.worker", str(config)],
            env={**environment, "RANK": str(i), "LOCAL_RANK": str(i)},
            start_new_session=True,  # otherwise a Ctrl-C in the terminal would reach them twice
        )
        for i in range(processes)
    ]

    # 3. signals go to the processes until all have ended
    def forward(number: int, frame: Any) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        return _wait(children)
    finally:
        for child in children:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen]) -> int:
    """Wait for all children; kill those that still run `GRACE_SECONDS` after the first failure."""
    failed, since = 0, 0.0
    while any(child.poll() is None for child in children):
        time.sleep(0.2)
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > GRACE_SECONDS:  # they block in a collective with the failed process
            for child in children:
                child.kill()
    return failed or next((child.returncode for child in children if child.returncode), 0)
