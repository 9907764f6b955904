"""The sentence for a config key or config group that does not exist: a typing error, or a name of an older version."""

import difflib
import re
from collections.abc import Iterable

# Old name → new name, for keys and config groups; `*` stands for one component, which stays as it is.
RENAMED = {
    "arm": "variant",
    "guards.*.over": "guards.*.window",
    "model.attention": "model.attn_implementation",
    "ppo.value": "ppo.value_model",
    "ppo.yardstick_every": "ppo.reference_every",
    "reward.centre_on": "reward.baseline_rows",
}


def unknown_key(key: str, allowed: Iterable[str], kind: str = "key") -> str:
    """The message for a `key` that does not exist.

    Args:
        key: the key as the user wrote it, with the keys above it: `ppo.stepz`.
        allowed: the keys that exist in its place.
        kind: "key" or "config group".

    Returns:
        `ppo.stepz: there is no such key, did you mean steps?; allowed: …`, or, for an old name,
        `ppo.value: there is no such key, it is ppo.value_model now; allowed: …`.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
    renamed = present_name(key)
    hint = f", it is {renamed} now" if renamed else f", did you mean {close[0]}?" if close else ""
    choices = f"; allowed: {', '.join(names)}" if names else ""
    return f"{key}: there is no such {kind}{hint}{choices}"


def present_name(key: str) -> str | None:
    """The present name of an old key; None if `key` was never a key."""
    for old, new in RENAMED.items():
        match = re.fullmatch(re.escape(old).replace(r"\*", r"([^.]+)"), key)
        if match:
            return new.replace("*", "".join(match.groups()))
    return None
