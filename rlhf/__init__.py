"""RLHF experiments: supervised fine-tuning, reward modelling and LoRA-PPO, composed by Hydra."""

import logging
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = ["PACKAGE", "__version__", "compose", "load_policy", "results", "root", "run"]

__version__ = "0.1.0"
PACKAGE = Path(__file__).parent


def root() -> Path:
    """The folder that holds `conf`, `experiments` and `sweeps`: the checkout, or the data inside an installed wheel."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "conf" / "config.yaml").exists() else PACKAGE / "_root"


def import_from_here() -> None:
    """Let a command import parts of one's own, such as `mine.parts`, from the current folder, as `python -m` would.

    The folder comes last, so that no file in it takes the place of a package.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


# Hydra resolves its search path before any of our code runs in a job, so the root travels in the environment.
os.environ["RLHF_ROOT"] = str(root())

# peft imports bitsandbytes, which tells of each kernel that it could not download, even if nothing is quantized.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# torchmetrics imports matplotlib, which lists the fonts when a machine first needs it, and says so.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

# In a notebook tqdm, which datasets imports, advises to install ipywidgets; without it there are no bars.
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    from rlhf.notebooks import compose, load_policy, results, run

IN_NOTEBOOKS = ("compose", "load_policy", "results", "run")


def __getattr__(name: str) -> Any:
    """`rlhf.compose` and the like (`rlhf.notebooks`), imported when first used: commands must start at once."""
    if name not in IN_NOTEBOOKS:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(import_module("rlhf.notebooks"), name)
