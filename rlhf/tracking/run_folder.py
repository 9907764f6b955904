"""The folder of a run, which stays empty until the run begins, so that mistakes and dry runs leave nothing behind.

Hydra would write `.hydra/` and the log at the start of every job: into the folder of a run that is finished, or of one
that never comes to be.
"""

import logging
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf.files import aside

HYDRA = ".hydra"  # what the run was composed from: config.yaml, hydra.yaml and overrides.yaml
LOG_FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # as Hydra's own
MOST_HELD = 100_000  # log records that wait for the run to begin
_present: list[Path] = []


class HeldLog(MemoryHandler):
    """Holds log records back until there is a file for them."""

    def __init__(self) -> None:
        super().__init__(MOST_HELD, flushLevel=logging.CRITICAL + 1, flushOnClose=False)

    def open(self, path: Path) -> None:
        """Write what was held, and from now on every record, to the file."""
        if self.target is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.capacity, self.target = 1, logging.FileHandler(path, encoding="utf-8")
            self.target.setFormatter(logging.Formatter(LOG_FORMAT))
            self.flush()

    def close(self) -> None:
        """Close the file as well."""
        if self.target is not None:
            self.target.close()
        super().close()


def hold_log() -> None:
    """Have the log wait for `begin`; Hydra removes the handler of an earlier job in this process when it starts one."""
    logging.getLogger().addHandler(HeldLog())


def begin(folder: Path, config: DictConfig) -> None:
    """Write what the run was composed from into its folder, and the log from here on."""
    hydra = HydraConfig.instance().cfg
    parts = {"config": config, "hydra": hydra, "overrides": HydraConfig.get().overrides.task}
    (folder / HYDRA).mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with aside(folder / HYDRA / f"{name}.yaml") as temporary:
            OmegaConf.save(part, temporary)
    open_log(folder)


def open_log(folder: Path) -> None:
    """Write the log to its file in a folder, also what was logged before."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, HeldLog):
            handler.open(folder / f"{HydraConfig.get().job.name}.log")


def note_present(folder: Path) -> None:
    """Note which of the folders above, where a job will be, are there before Hydra makes the others."""
    _present[:] = [next(place for place in (folder, *folder.parents) if place.exists()).resolve()]


def remove_empty(folder: Path) -> None:
    """Remove the folder of a job that has not begun, with those above it that were made for it."""
    top = _present[0] if _present else folder.parent  # a process of a sweep's launcher knows only its own
    with suppress(OSError):  # another process has just begun there, or the disk is read-only
        for place in (folder, *folder.parents):
            if place == top or any(place.iterdir()):
                return
            place.rmdir()
