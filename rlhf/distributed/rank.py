"""What a process knows about its place in a run before torch is imported: process counts and launch rank."""

import os
from collections.abc import Mapping, Sequence
from typing import Any


def processes_per_node(trainer: Mapping[str, Any], gpus: int | None) -> int | None:
    """Number of processes that a `trainer` configuration asks for on each node.

    Args:
        trainer: the config group `trainer`.
        gpus: GPUs of such a node, or None if that is not known here.

    Returns:
        The number of devices that the configuration lists or counts; for `devices: auto`, 1 on a CPU and `gpus`
        elsewhere.
    """
    devices = trainer.get("devices", 1)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices).isdigit():
        return int(devices)
    if trainer.get("accelerator") == "cpu":
        return 1
    return gpus


def is_first_process() -> bool:
    """Whether this process was launched as rank 0, the one that prints messages and writes files.

    Reads the environment (torchrun's RANK, SLURM's SLURM_PROCID), so it works before the process group exists;
    `rlhf.distributed.collectives.is_rank_zero` asks the process group.
    """
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
