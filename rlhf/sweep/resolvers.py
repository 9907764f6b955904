"""OmegaConf resolvers for the YAML files. Imported before Hydra composes, so torch must not be imported here."""

import hashlib
import re

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

MAX_FOLDER_BYTES = 180  # file systems allow 255 for a name


def folder_name(overrides: str) -> str:
    """`${rlhf.folder:…}`: the name of a run's folder from its overrides, safe for shells and file systems.

    If characters had to be replaced or cut off, ten digits of the SHA-256 of `overrides` are appended, so that two
    runs never share a folder.
    """
    name = re.sub(r"[^\w.+@-]+", "-", overrides).strip("-.")
    short = name.encode()[:MAX_FOLDER_BYTES].decode(errors="ignore")
    if short == overrides:
        return short or "default"
    return f"{short}-{hashlib.sha256(overrides.encode()).hexdigest()[:10]}".lstrip("-")


def run_dir() -> str:
    """`${rlhf.run_dir:}`: Hydra's output directory, or the current folder if only a configuration is composed."""
    return HydraConfig.get().runtime.output_dir if HydraConfig.initialized() else "."


def shifted_seed(published: int, replicate: int) -> int:
    """`${rlhf.seed:42,${replicate}}`: a published seed for replicate 0, and another one for every other replicate."""
    return published + replicate


def times(number: float, factor: float) -> float:
    """`${rlhf.times:${ppo.lr},0.1}`: a number that follows another one, such as a grid beside a grid."""
    return float(f"{number * factor:.12g}")  # 0.003 · 0.1 is 0.0003, without a digit of rounding in names and tables


OmegaConf.register_new_resolver("rlhf.folder", folder_name, replace=True)
OmegaConf.register_new_resolver("rlhf.run_dir", run_dir, replace=True)
OmegaConf.register_new_resolver("rlhf.seed", shifted_seed, replace=True)
OmegaConf.register_new_resolver("rlhf.times", times, replace=True)
