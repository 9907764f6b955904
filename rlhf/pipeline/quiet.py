"""What other libraries print, silenced where it is noise here."""

import logging
import os
import warnings


def quieten() -> None:
    """Silence advice that does not apply to these training loops, and progress bars inside progress bars."""
    import datasets
    import transformers

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers", ".*LeafSpec", ".*have no `val_dataloader`", ".*in eval mode at the start",
        ".*exists and is not empty", ".*`srun` command is available", ".*sync_dist=True",
        "Already found a `peft_config`", ".*weights_only", ".*unreliable results if further training is done",
        "fan_in_fan_out is set to",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("bm25s").addFilter(_is_grave)  # which logs every index at DEBUG, a level that it sets itself
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # our own error message replaces it
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _is_grave(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
