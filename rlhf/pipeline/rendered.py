"""What a model reads and what it learns of it: the first row of a stage, in the log and in `rendered.txt`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.files import RENDERED, aside

log = logging.getLogger(__name__)


def show_rendered(
    folder: Path, stage: str, tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, Sequence[int]]
) -> None:
    """Log token ids as text with all special tokens, and keep it in `folder`.

    Args:
        folder: Of the run, or of a product of the cache.
        stage: What the texts are of, such as `sft`.
        tokenizer: Decodes them.
        texts: Token ids by what they are, such as `prompt` and `response`.
    """
    parts = [
        f"--- {stage}: {name}, {len(ids)} tokens ---\n{tokenizer.decode(ids, skip_special_tokens=False)}"
        for name, ids in texts.items()
    ]
    shown = "\n".join(parts)
    log.info("the first row as the model reads it (kept in %s):\n%s", RENDERED, shown)
    with aside(folder / RENDERED) as temporary:
        temporary.write_text(f"{shown}\n", encoding="utf-8")
