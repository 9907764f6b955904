"""One of several processes on one run: `python -m rlhf.worker CONFIG`, started by `rlhf.distributed.processes`."""

import logging
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf

from rlhf.cli import attempt
from rlhf.distributed.rank import is_first_process
from rlhf.files import FAILED


def main() -> None:
    """Do what `rlhf` would do in one process; exits as it does."""
    whole = OmegaConf.load(sys.argv[1])
    assert isinstance(whole, DictConfig)
    hydra = whole.pop("hydra")
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": hydra})  # type: ignore[assignment]
    configure_log(hydra.job_logging, hydra.verbose)
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)
    folder = Path(hydra.runtime.output_dir)
    attempt(whole, folder, sweeping=hydra.mode == "MULTIRUN")
    sys.exit((folder / FAILED).exists())  # in a sweep a failure is only noted; True is exit code 1


if __name__ == "__main__":
    main()
