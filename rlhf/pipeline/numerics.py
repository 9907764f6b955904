"""The numerics of a process: which kernels compute, how they round, and whether they give the same bits every time."""

import os

import torch


def settle_numerics(deterministic: bool | str | None = False) -> None:
    """Choose the kernels of this process; every command that runs a model calls this before it makes one.

    Float32 products may be rounded to TF32 where a GPU has it. Attention has all of torch's back ends but cuDNN's: that
    one makes a plan for every new shape, which takes 0.2 to 2.4 s (measured on an H200 with torch 2.11, which prefers
    it), and almost every batch has a new shape.

    Args:
        deterministic: `trainer.deterministic`. True makes kernels on a GPU give the same bits every time, and raises
            where torch has no such kernel; "warn" warns there. On a CPU they do without.
    """
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # cuBLAS needs a workspace of fixed size. It reads this once per process, and a later run in this process may be
    # deterministic, so it is set in any case; on Hopper, torch's own workspace has the same size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1" if deterministic else "0"  # transformers hands it to flash_attn
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    # nothing here reads what it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
