"""Several processes on one run: which of them this is, what they add up, how they are started.

Every process walks through the same stages with its own share of each batch; what is decided once (is it built already?
what did the judge say?) is decided by the first and told to the others. Alone, everything here is the identity.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.sweep.slurm import processes_per_node

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # the first process may wait long for a lock; one that dies takes the others with it
GRACE_SECONDS = 20  # for the other processes to leave by themselves, once one has
PARENT = "RLHF_LAUNCHER"
BUCKET = 2**24  # numbers added up at once: 64 MiB of float32
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # finish the step, save, leave
_joined: list[ClusterEnvironment] = []
_by_itself: list[bool] = []
_least: list[Callable[[], Any]] = []  # the smallest pass through a base that is spread over the processes


class DataParallel(DDPStrategy):
    """Lightning's DDP without its wrapper: `rlhf.stages.base.Stage.accumulate` adds the gradients up, once a step.

    The wrapper would add them up in every backward pass, of which a step has several.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class Sharded(DataParallel):
    """The same around a frozen base of which each process holds its share (`rlhf.models.sharding`)."""

    def setup(self, trainer: lightning.Trainer) -> None:
        """Lightning sends the first process's weights to the others, which must keep their own shares."""
        assert self.model is not None
        shares = [name for name, parameter in self.model.named_parameters() if isinstance(parameter, DTensor)]
        self.model._ddp_params_and_buffers_to_ignore = shares  # type: ignore[assignment]
        super().setup(trainer)

    def teardown(self) -> None:
        """Leave the module on its device, as Lightning's own strategies for shards do: there are passes to come."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


# -- who we are ------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes work on this run; 1 inside of what the first does for all (`from_first`)."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself else 1


def is_first() -> bool:
    """Whether this is the process that decides and writes."""
    return rank() == 0


# -- what they tell each other ---------------------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """The sum of `x` over the processes."""
    if size() == 1:
        return x
    catch_up()
    x = x.clone()
    dist.all_reduce(x)
    return x


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in few messages."""
    if size() == 1:
        return
    catch_up()
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):  # a set has another order in each process
        for bucket in _buckets([tensor for tensor in tensors if tensor.dtype == kind]):
            flat = torch.cat([member.flatten() for member in bucket])
            dist.all_reduce(flat)
            for member, summed in zip(bucket, flat.split([member.numel() for member in bucket]), strict=True):
                member.copy_(summed.view_as(member))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in turn, together while they hold no more numbers than `BUCKET`."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(map(torch.numel, bucket)) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def gathered(value: T) -> list[T]:
    """What every process holds, in their order."""
    if size() == 1:
        return [value]
    catch_up()
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives, or raises, in the first process; the others do not call it."""
    if size() == 1:
        return make()
    value, failure = None, None
    if is_first():
        _by_itself.append(True)
        try:
            value = make()
        except Exception as error:
            failure = error
        finally:
            _by_itself.pop()
    catch_up()
    told: list[Any] = [(value, failure and _portable(failure))]
    dist.broadcast_object_list(told)
    if failure is not None:  # with its own traceback
        raise failure
    value, failure = told[0]
    if failure is not None:
        raise failure
    return value


def _portable(error: Exception) -> Exception:
    """One of our own exceptions as it is; of another, which may hold anything, what it says."""
    plain = type(error).__module__.startswith("rlhf.") and all(isinstance(part, str | int) for part in error.args)
    return error if plain else RuntimeError(f"{type(error).__name__}: {error}")


# -- in step ---------------------------------------------------------------------------------------------------------


def keep_step(base: nn.Module, least: Callable[[], Any]) -> None:
    """From now on a pass through `base` is one of all processes, as each holds but a share of its weights.

    How many passes each has to make between two messages is its own affair: a process announces every pass, and those
    that have come to the next message already make the smallest one, `least`, along with it.
    """

    def announce(*_: Any) -> None:
        if _least:
            _busy(1)

    base.register_forward_pre_hook(announce)
    _least[:] = [least]


def part_ways() -> None:
    """The base that the processes passed through together is not used any more."""
    _least.clear()


@torch.no_grad()
def catch_up() -> None:
    """Make passes along with the other processes until all have come here; at once where each has its own base."""
    own = _least[:]
    while own and _busy(0):
        _least.clear()  # nothing to announce
        own[0]()
        _least[:] = own


def _busy(passes: int) -> int:
    """How many processes pass through the base now."""
    count = torch.tensor(passes)
    dist.all_reduce(count)
    return int(count)


def to_fill_up(parts: Sequence[T]) -> list[T]:
    """Parts to go through once more, as another process has more of them and backward passes are in step, too.

    To be asked before the first backward pass: those are not announced.
    """
    return [parts[-1]] * (max(gathered(len(parts))) - len(parts)) if _least else []


# -- how they come to be ---------------------------------------------------------------------------------------------


def wanted(trainer: Mapping[str, Any]) -> int:
    """Processes per node that a `trainer` configuration asks for, here."""
    return processes_per_node(trainer, torch.cuda.device_count()) or 1


def shares(trainer: Mapping[str, Any]) -> int:
    """Over how many processes a `trainer` configuration spreads the base (1: each holds it whole)."""
    strategy = trainer.get("strategy")
    sharded = isinstance(strategy, Mapping) and strategy.get("_target_") == f"{__name__}.{Sharded.__name__}"
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
