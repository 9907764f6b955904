"""A mistake of the user, told as one sentence that names what is wrong and what is allowed."""

import difflib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from rlhf import root
from rlhf.errors import ConfigError, DamagedError, DataError, GuardStop, ModelError, RunError
from rlhf.errors.machine import of_the_machine

_NO_OPTION = "Config group override must be a string or a list."  # Hydra's words, in a bare ValueError


def is_mistake(error: BaseException) -> bool:
    """Whether the configuration, the data or the model cannot be used, which the message says in a sentence."""
    return isinstance(error, ConfigError | DataError | ModelError | DamagedError)


def explain(error: BaseException) -> str | None:
    """One sentence for an error that is the user's to mend, None for one that is ours."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OverrideParseException):
        return _explain_grammar(str(error.override))
    if isinstance(error, HydraException | OmegaConfBaseException) or _NO_OPTION in str(error):
        return _explain_composition(str(error), str(error.__cause__ or ""))
    return str(error) if isinstance(error, GuardStop) or is_mistake(error) else None


def _explain_grammar(override: str) -> str:
    """For a word of the command line that Hydra's grammar cannot read, such as a slice without quotes."""
    key, _, value = override.partition("=")
    parts = ["…", "…"] if value[:1] in ("[", "{") else [part.strip(" '\"") for part in value.split(",")]
    quoted = ",".join(f'"{part}"' for part in parts)
    word = f"{key}=[{quoted}]" if value[:1] in ("[", "{") else f"{key}={quoted}"
    return (
        f"{override}: the command line cannot be read here, because text with brackets, braces, parentheses or quotes "
        f"in it must be quoted; allowed: '{word}', with both kinds of quotes"
    )


def _explain_composition(message: str, cause: str) -> str:
    missing = re.search(r"Could not find '([^']+)/([^']+)'", message)
    if "hydra/launcher/submitit_slurm" in message:
        return "hydra/launcher=slurm needs the package hydra-submitit-launcher: pip install 'rlhf[slurm]'"
    if "hydra/sweeper/optuna" in message:
        return "hydra/sweeper=search needs the package hydra-optuna-sweeper: pip install 'rlhf[optuna]'"
    if missing:
        group, option = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
        return f"{group}={option}: there is no such option; allowed: {', '.join(options) or 'nothing'}"
    override = re.search(r"Could not override '([^']+)'", message)
    if override:
        key = override[1]
        if "No match in the defaults list" in message:
            return f"{key}: there is no such config group{_suggest(key, _groups())}"
        parent, _, last = key.rpartition(".")
        while not (allowed := _keys(parent)) and parent:  # the key is wrong further up
            key, (parent, _, last) = parent, parent.rpartition(".")
        return f"{key}: there is no such key{_suggest(last, allowed)}"
    if _NO_OPTION in message:
        return f"a config group was given no option but {message.rpartition(' ')[2]}; allowed: group=option"
    lines = [line.strip() for line in (message + "\n" + cause).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines[:3]))


def _keys(parent: str) -> list[str]:
    """The keys of a node of the configuration, as the options chosen on the command line make it."""
    GlobalHydra.instance().clear()
    options = [word for word in sys.argv[1:] if re.split("[@=]", word)[0] in _groups() and "," not in word]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
        try:
            config = hydra.compose("config", options)
        except HydraException:  # an option is wrong, too
            config = hydra.compose("config")
    node = OmegaConf.select(config, parent) if parent else config
    return sorted(str(key) for key in node) if isinstance(node, DictConfig) else []


def _groups() -> list[str]:
    return sorted(path.name for path in (root() / "conf").iterdir() if path.is_dir())


def _suggest(key: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{hint}; allowed: {', '.join(allowed)}" if allowed else hint


@contextmanager
def in_a_sentence(command: str) -> Iterator[None]:
    """Ends a command in a sentence: with exit code 2 for a mistake of the user, 1 for a failure of the machine."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, RunError) or is_mistake(error)
        reason = str(error) if ours else of_the_machine(error)
        if reason is None:
            raise
        print(f"{command}: {reason}", file=sys.stderr)
        raise SystemExit(2 if ours else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
