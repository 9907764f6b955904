"""Functions that run in two processes of one torch.distributed group."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf.distributed import processes


def run_in_two_processes(work: Callable, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in two processes of one group; raises what either of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a fork has imported everything already, but CUDA and autograd's threads for it do not survive one
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(_member, (port, work, arguments), nprocs=2, start_method=method)


def _member(rank: int, port: int, work: Callable, arguments: Sequence[Any]) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in own.items()}
    torch.set_num_threads(1)
    with processes.process_group():
        work(rank, *arguments)
