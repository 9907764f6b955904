"""How several processes come to work on one run: found in the environment, or started here."""

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

from rlhf.distributed.collectives import part_ways
from rlhf.distributed.rank import processes_per_node
from rlhf.distributed.strategies import Sharded

PATIENCE = timedelta(days=1)  # the first process may wait long for a lock; one that dies takes the others with it
GRACE_SECONDS = 20  # for the other processes to leave by themselves, once one has
PARENT = "RLHF_LAUNCHER"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # finish the step, save, leave
_joined: list[ClusterEnvironment] = []


def wanted(trainer: Mapping[str, Any]) -> int:
    """Processes per node that a `trainer` configuration asks for, here."""
    return processes_per_node(trainer, torch.cuda.device_count()) or 1


def shares(trainer: Mapping[str, Any]) -> int:
    """Over how many processes a `trainer` configuration spreads the base (1: each holds it whole)."""
    strategy = trainer.get("strategy")
    sharded = isinstance(strategy, Mapping) and strategy.get("_target_") == f"{Sharded.__module__}.{Sharded.__name__}"
    return wanted(trainer) * trainer.get("num_nodes", 1) if sharded else 1


def environment() -> ClusterEnvironment | None:
    """Who started us as one of several processes (torchrun, srun, or `launch`); None when we are alone."""
    if _joined:  # Lightning, done with a stage, takes away the variables it is read from
        return _joined[-1]
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
def joined() -> Iterator[None]:
    """Belong to the group of processes that we were started in, if there is one."""
    place = environment()
    if place is None or dist.is_initialized():
        yield
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place.main_address, str(place.main_port)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank())
    dist.init_process_group(backend, timeout=PATIENCE, rank=place.global_rank(), world_size=place.world_size())
    _joined.append(place)
    try:
        yield
    finally:
        _joined.pop()
        part_ways()
        dist.destroy_process_group()


def orphaned() -> bool:
    """Whether the process that started us is no more."""
    return PARENT in os.environ and os.getppid() != int(os.environ[PARENT])


def launch(processes: int, config: Path) -> int:
    """Start `python -m rlhf.worker CONFIG` as many times, pass signals on, wait; returns the first exit code not 0.

    torchrun would do, but it kills what has not left 30 seconds after a signal, in the middle of a long step, and does
    not pass SIGUSR1 on.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = str(os.getpid())
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "rlhf.worker", str(config)],
            env={"OMP_NUM_THREADS": threads, **os.environ, **group, "RANK": str(i), "LOCAL_RANK": str(i), PARENT: own},
            start_new_session=True,  # or the terminal's Ctrl-C would reach them twice
        )
        for i in range(processes)
    ]

    def pass_on(number: int, frame: Any) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return _wait(children)
    finally:
        for child in children:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen]) -> int:
    failed, since = 0, 0.0
    while any(child.poll() is None for child in children):
        time.sleep(0.2)
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > GRACE_SECONDS:  # they wait for one that is no more
            for child in children:
                child.kill()
    return failed or next((child.returncode for child in children if child.returncode), 0)
