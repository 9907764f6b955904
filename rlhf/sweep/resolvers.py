"""What the YAML files may compute. Imported before Hydra composes, so it must not import torch."""

import hashlib
import re

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

LONGEST_FOLDER = 180  # bytes: file systems allow 255 for a name


def folder_name(overrides: str) -> str:
    """A run's folder from its overrides: readable, without characters that shells or file systems mind.

    Where that is not all that the overrides say, a digest of them follows, or two runs would share a folder.
    """
    name = re.sub(r"[^\w.+@-]+", "-", overrides).strip("-.")
    short = name.encode()[:LONGEST_FOLDER].decode(errors="ignore")
    if short == overrides:
        return short or "default"
    return f"{short}-{hashlib.sha256(overrides.encode()).hexdigest()[:10]}".lstrip("-")


def run_dir() -> str:
    """Where Hydra put the run; the current folder for a configuration composed without a run."""
    return HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else "."


OmegaConf.register_new_resolver("rlhf.folder", folder_name, replace=True)
OmegaConf.register_new_resolver("rlhf.run_dir", run_dir, replace=True)
