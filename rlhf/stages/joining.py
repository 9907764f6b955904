"""Packing as published: texts joined by EOS and cut into sequences of equal length (`sft.packing=joined`).

TRL's examples of 2023 pack in this way. Unlike `rlhf.models.sequences.pack`, it keeps no text apart from its neighbours
in the same sequence: tokens attend to them, and positions go on counting. A text may be cut anywhere.
"""

import logging
from collections.abc import Sequence

import torch

from rlhf.errors import DataError
from rlhf.seeding import generator
from rlhf.stages.cutting import Encoded

log = logging.getLogger(__name__)


def joined(texts: Sequence[Encoded], width: int, seed: int) -> list[Encoded]:
    """Sequences of exactly `width` tokens, each an empty prompt and a response; there is no padding.

    The texts, which end with EOS, are joined in a random order; what is left at the end is dropped.

    Raises:
        DataError: the texts together have fewer tokens than one sequence.
    """
    order = torch.randperm(len(texts), generator=generator(seed, "joining", 0)).tolist()
    ids = [token for row in order for part in texts[row] for token in part]
    sequences: list[Encoded] = [([], ids[at : at + width]) for at in range(0, len(ids) - width + 1, width)]
    if not sequences:
        raise DataError(
            f"sft.packing=joined: the {len(texts):,} texts have {len(ids):,} tokens, fewer than one sequence of "
            f"sft.max_length={width}"
        )
    log.info("%d texts are joined and cut into %d sequences of %d tokens; tokens attend to the texts before their own",
             len(texts), len(sequences), width)  # fmt: skip
    return sequences
