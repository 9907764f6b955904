"""RLHF experiments: supervised fine-tuning, reward modelling and LoRA-PPO, composed by Hydra."""

import logging
import os
from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent


def root() -> Path:
    """The folder that holds `conf`, `experiments` and `sweeps`: the checkout, or the data inside an installed wheel."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "conf" / "config.yaml").exists() else PACKAGE / "_root"


# Hydra resolves its search path before any of our code runs in a job, so the root travels in the environment.
os.environ["RLHF_ROOT"] = str(root())

# peft imports bitsandbytes, which tells of each kernel that it could not download, even if nothing is quantized.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
