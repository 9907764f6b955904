"""What the environment says of this process. No torch here: the command line asks before it is loaded."""

import os
from collections.abc import Mapping, Sequence
from typing import Any


def processes_per_node(trainer: Mapping[str, Any], gpus: int | None) -> int | None:
    """Processes that a `trainer` configuration asks for on a node of so many GPUs; None if only the node can tell."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if str(devices).isdigit():
        return int(devices)
    if trainer.get("accelerator") == "cpu":
        return 1
    return gpus


def is_first_process() -> bool:
    """Whether this process is the one of its run that speaks for it."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
