"""`model.dtype=auto`: bfloat16 where the processor multiplies it and the model is large enough to gain from it."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from rlhf.models.sizes import Sizes
from rlhf.settings import ModelSettings

LARGE = 10_000_000  # weights of linear layers: with 10.6 million a PPO step in bfloat16 took 0.7 of the processor time
AMPERE = (8, 0)  # the first compute capability of NVIDIA with products of bfloat16
PRODUCTS = {"avx512_bf16", "amx_bf16", "bf16"}  # what /proc/cpuinfo calls those of CPUs (x86, x86, ARM)


def trains_on_gpu(config: DictConfig) -> bool:
    """Whether the configured trainer uses a GPU on this machine."""
    return torch.cuda.is_available() and config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")


def automatic_dtype(model: ModelSettings, on_gpu: bool) -> str:
    """The dtype that `auto` stands for: float32 for a small model, and for one whose configuration is not at hand."""
    unnamed = model.name_or_path is None and not model.config
    if unnamed or not (gpu_multiplies_bfloat16() if on_gpu else cpu_multiplies_bfloat16()):
        return "float32"
    sizes = Sizes.of(model, None)
    return "bfloat16" if sizes is not None and sizes.linear >= LARGE else "float32"


def gpu_multiplies_bfloat16() -> bool:
    """Whether the GPU has instructions for products of bfloat16, and does not merely emulate them."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability() >= AMPERE


def cpu_multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has instructions for products of bfloat16; False where its flags cannot be read."""
    if not cpuinfo.is_file():
        return False
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not PRODUCTS.isdisjoint(flags.split())
