"""The sentence for a config key or config group that does not exist: a typing error, or a name of an older version."""

import difflib
import re
from collections.abc import Iterable, Iterator

from omegaconf import DictConfig, OmegaConf

# Old name → new name, for keys and config groups; `*` stands for one component, which stays as it is.
RENAMED = {
    "arm": "variant",
    "guards.*.over": "guards.*.window",
    "model.attention": "model.attn_implementation",
    "ppo.value": "ppo.value_model",
    "ppo.yardstick_every": "ppo.reference_every",
    "reward.centre_on": "reward.baseline_rows",
}


# What other libraries call a key → its name here.
SYNONYMS = {
    "beta": "coef",
    "cliprange": "clip_range",
    "cliprange_value": "value_clip_range",
    "gradient_accumulation_steps": "microbatch_tokens",
    "init_kl_coef": "coef",
    "kl_coef": "coef",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_rank": "r",
    "max_seq_length": "max_length",
    "mini_batch_size": "minibatch_size",
    "model_name_or_path": "name_or_path",
    "num_ppo_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "ppo_epochs": "epochs",
    "rank": "r",
    "vf_coef": "value_coef",
}
MOST_SUGGESTED = 4


def unknown_key(key: str, allowed: Iterable[str], kind: str = "key", everywhere: Iterable[str] = ()) -> str:
    """The message for a `key` that does not exist.

    Args:
        key: the key as the user wrote it, with the keys above it: `ppo.stepz`.
        allowed: the keys that exist in its place.
        kind: "key" or "config group".
        everywhere: all keys of the configuration, each with the keys above it, in case the place is wrong.

    Returns:
        `ppo.stepz: there is no such key, did you mean steps?; allowed: …`, or, for an old name,
        `ppo.value: there is no such key, it is ppo.value_model now; allowed: …`.
    """
    names = sorted(allowed)
    close, renamed = _meant(key, names, sorted(everywhere)), present_name(key)
    hint = f", it is {renamed} now" if renamed else f", did you mean {close}?" if close else ""
    choices = f"; allowed: {', '.join(names)}" if names else ""
    return f"{key}: there is no such {kind}{hint}{choices}"


def unknown_option(choice: str, options: Iterable[str]) -> str:
    """The message for an option `GROUP=OPTION` that a group does not have."""
    names = list(options)
    close = difflib.get_close_matches(choice.rpartition("=")[2], names, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{choice}: there is no such option{hint}; allowed: {', '.join(names) or 'nothing'}"


def _meant(key: str, names: list[str], everywhere: list[str]) -> str | None:
    """What the key was probably meant to be: one of `names`, or else keys of the same name elsewhere."""
    name = key.rpartition(".")[2]
    same = {name, SYNONYMS.get(name, name)}
    if same & set(names):
        return min(same & set(names))
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return close[0]
    elsewhere = [other for other in everywhere if other.rpartition(".")[2] in same and other != key]
    # those that share most of the key's own place come first: kl_coef is kl.coef rather than another coef
    elsewhere.sort(key=lambda other: -difflib.SequenceMatcher(None, key, other).ratio())
    chosen = elsewhere[:MOST_SUGGESTED]
    return " or ".join([", ".join(chosen[:-1]), chosen[-1]] if len(chosen) > 1 else chosen) or None


def present_name(key: str) -> str | None:
    """The present name of an old key; None if `key` was never a key."""
    for old, new in RENAMED.items():
        match = re.fullmatch(re.escape(old).replace(r"\*", r"([^.]+)"), key)
        if match:
            return new.replace("*", "".join(match.groups()))
    return None


def keys_below(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """All keys of a configuration, each with the keys above it."""
    for key in node:
        yield f"{prefix}{key}"
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(child, DictConfig):
            yield from keys_below(child, f"{prefix}{key}.")
