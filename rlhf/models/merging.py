"""A saved adapter merged into its base: one model that plain transformers loads."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging

from rlhf.errors import explained


def merged(kind: Any, base: Path, adapter: Path, **options: Any) -> PreTrainedModel:
    """`kind.from_pretrained(base)` with the adapter merged in; load in float32, so that the sum is rounded once.

    A head of a classifier may be part of the adapter. `options` are keywords of `from_pretrained`.

    Raises:
        ModelError: base or adapter cannot be read, or the adapter does not fit the base.
    """
    with explained(f"{adapter}: no adapter could be merged into {base}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of transformers and peft
        warnings.filterwarnings("error", message="Found missing adapter keys")
        logging.set_verbosity_error()  # warns that the base of a reward model has no score head
        model: PreTrainedModel = PeftModel.from_pretrained(
            kind.from_pretrained(base, **options), adapter
        ).merge_and_unload()
    return model
