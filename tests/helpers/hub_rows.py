"""Messages, and data sets of data=hub made from rows."""

import json
from pathlib import Path
from typing import Any

from rlhf.data.hub import Hub
from rlhf.data.records import SPLITS
from tests.helpers.data_readers import TEMPLATE


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def hub(root: Path, **options: Any) -> Hub:
    """Make a `Hub`; splits given as lists of rows are written to files first, as JSON lines."""
    for split in set(options) & set(SPLITS):
        if isinstance(options[split], list):
            (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in options[split]))
            options[split] = f"{split}.jsonl"
    return Hub(**{"root": str(root), "template": TEMPLATE} | options)
