"""Random streams that depend on (seed, purpose, step) alone, so that a run continues anywhere."""

import hashlib

import torch


def generator(seed: int, purpose: str, step: int = 0, device: str = "cpu") -> torch.Generator:
    """An independent random stream for (seed, purpose, step), whatever was drawn before."""
    return torch.Generator(device).manual_seed(mixed_seed(seed, purpose, step))


def mixed_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed from (seed, purpose, step), the same in every process."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
