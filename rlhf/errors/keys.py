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

# Old option of a group → what it is now.
RENAMED_OPTIONS = {"lora=all_linear": "lora=r16_all, with lora.alpha=32 for its scale of 2"}

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
# How to choose what is no option of a group.
OWN = {
    "data": "files and data sets of the Hub are data=hub data.sft=FILE_OR_HUB_ID (docs/data.md)",
    "judge": "a language model is judge=llm_pool judge.model=NAME (docs/judges.md)",
    "lora": "another rank is lora=r8 lora.r=32",
    "model": "other models are model=custom model.name_or_path=HUB_ID_OR_FOLDER",
    "scorer": "a function is scorer=function scorer.function=package.module.name (docs/extending.md)",
}
MOST_SUGGESTED = 6  # keys of one name: each method has a learning rate


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
    names, (group, _, option) = list(options), choice.partition("=")
    close = difflib.get_close_matches(option, names, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    if choice in RENAMED_OPTIONS:
        hint = f", it is {RENAMED_OPTIONS[choice]} now"
    others = f"; {OWN[group]}" if group in OWN and not hint else ""
    return f"{choice}: there is no such option{hint}; allowed: {', '.join(names) or 'nothing'}{others}"


def _meant(key: str, names: list[str], everywhere: list[str]) -> str | None:
    """What the key was probably meant to be: one of `names`, or else keys of the same name elsewhere."""
    name = key.rpartition(".")[2]
    same = {name, SYNONYMS.get(name, name)}
    if same & set(names):
        return min(same & set(names))
    elsewhere = [other for other in everywhere if other.rpartition(".")[2] in same and other != key]
    # those that share most of the key's own place come first: kl_coef is kl.coef rather than another coef
    elsewhere.sort(key=lambda other: -difflib.SequenceMatcher(None, key, other).ratio())
    chosen = elsewhere[:MOST_SUGGESTED] or difflib.get_close_matches(name, names, n=1)
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
    for key in map(str, node):
        yield f"{prefix}{key}"
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        if isinstance(child, DictConfig):
            yield from keys_below(child, f"{prefix}{key}.")
