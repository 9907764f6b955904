"""From any exception to the exit code and the one sentence that a command prints for it."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf import root
from rlhf.errors import FAILURE, KEYBOARD, MISTAKE, STOPPED, GuardStop, UserError, missing_package
from rlhf.errors.keys import keys_below, unknown_key, unknown_option
from rlhf.errors.machine import machine_failure
from rlhf.errors.users_code import failure_in_users_code

_NO_OPTION = "Config group override must be a string or a list."  # Hydra raises this as a bare ValueError


def exit_with_sentence(command: str, error: Exception) -> None:
    """Print one sentence and exit, if the user or an administrator can mend the error; return if it is a bug.

    Raises:
        SystemExit: with code MISTAKE, STOPPED (a guard) or FAILURE (of the machine).
    """
    failure = None if isinstance(error, UserError) else machine_failure(error)
    mistake = None if failure else explain(error)
    if mistake or failure:
        print(f"{command}: {mistake or failure}", file=sys.stderr)
        raise SystemExit(STOPPED if isinstance(error, GuardStop) else MISTAKE if mistake else FAILURE) from None


@contextmanager
def one_sentence_errors(command: str) -> Iterator[None]:
    """`exit_with_sentence` for any error inside the block, and exit code KEYBOARD after Ctrl-C.

    Errors that are bugs are raised as they are.
    """
    try:
        yield
    except Exception as error:
        exit_with_sentence(command, error)
        raise
    except KeyboardInterrupt:
        raise SystemExit(KEYBOARD) from None
    except SystemExit as leaving:  # Lightning exits with 1 when it has caught the second Ctrl-C
        raise SystemExit(KEYBOARD) if isinstance(leaving.__context__, KeyboardInterrupt) else leaving from None


def explain(error: BaseException) -> str | None:
    """One sentence for an error that the user can mend: Hydra's, our own, or in the user's code; None for any other."""
    if isinstance(error, OverrideParseException):
        return _explain_grammar(str(error.override))
    if isinstance(error, HydraException | OmegaConfBaseException) or _NO_OPTION in str(error):
        return _explain_composition(str(error), str(error.__cause__ or ""))
    return str(error) if isinstance(error, UserError) else failure_in_users_code(error)


def _explain_grammar(override: str) -> str:
    """For an override that Hydra's grammar cannot parse, such as a slice of a data set without quotes."""
    key, given, value = override.partition("=")
    if not given and re.fullmatch(r"[\w./@]+", key):
        return f"{override} has no value; allowed: GROUP=OPTION, such as ppo=paper, or KEY=VALUE, such as ppo.steps=100"
    parts = ["…", "…"] if value[:1] in ("[", "{") else [part.strip(" '\"") for part in value.split(",")]
    quoted = ",".join(f'"{part}"' for part in parts)
    word = f"{key}=[{quoted}]" if value[:1] in ("[", "{") else f"{key}={quoted}"
    return (
        f"{override}: the command line cannot be parsed here, because text with brackets, braces, parentheses or "
        f"quotes in it must be quoted; allowed: '{word}', with both kinds of quotes"
    )


def _explain_composition(message: str, cause: str) -> str:
    """For an error of Hydra or OmegaConf while the configuration is composed, recognised by its `message`."""
    # 1. plugins of the optional extras
    if "hydra/launcher/submitit_slurm" in message:
        return missing_package("hydra/launcher=slurm", "hydra-submitit-launcher", "slurm")
    if "hydra/sweeper/optuna" in message:
        return missing_package("hydra/sweeper=search", "hydra-optuna-sweeper", "optuna")
    # 2. an option that the group does not have
    missing = re.search(r"Could not find '([^']+)/([^']+)'", message)
    if missing:
        group, option = missing.groups()
        options = re.findall(r"^\t(\S+)$", message, re.MULTILINE)
        return unknown_option(f"{group}={option}", options)
    # 3. a group or a key that does not exist
    override = re.search(r"Could not override '([^']+)'", message)
    if override:
        key = override[1]
        if key.startswith("hydra."):
            return (
                f"{key}: Hydra's own configuration has no such key; allowed: a key that it has, or a new one with a "
                "plus before it, as +hydra.sweeper.params.seed='1,2', which is seed=1,2 after -m"
            )
        if "No match in the defaults list" in message:
            return _without_place(key) or unknown_key(key, _groups(), "config group", keys_below(_composed()))
        config, parent = _composed(), key.rpartition(".")[0]
        while not (allowed := _keys(config, parent)) and parent:  # the key above it is already wrong
            key, parent = parent, parent.rpartition(".")[0]
        return _without_place(key.replace(".", "/")) or unknown_key(key, allowed, everywhere=keys_below(config))
    # 4. a group without an option, and anything else in the words of Hydra
    if _NO_OPTION in message:
        return _no_option(message.rpartition(" ")[2])
    several = re.search(r"Ambiguous value for argument '([^']+)'", message)
    if several:
        key, _, values = several[1].partition("=")
        return (
            f"{several[1]}: several values make a sweep, rlhf -m {several[1]}; allowed without -m: one value, or a "
            f"list as {key}=[{values}]"
        )
    lines = [line.strip() for line in (message + "\n" + cause).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines[:3]))


def _without_place(group: str) -> str | None:
    """For a group inside a group, such as data/template, that the chosen option of the outer one does not have."""
    outer, _, inner = group.partition("/")
    folder = root() / "conf" / outer
    options = sorted(path.stem for path in (folder / inner).glob("*.yaml")) if inner else []
    having = [path.stem for path in folder.glob("*.yaml") if f"\n  - {inner}:" in path.read_text(encoding="utf-8")]
    if not options:
        return None
    return (
        f"{group}: the chosen option of {outer} has no {inner}; allowed: {group}={', '.join(options)} with "
        f"{outer}={', '.join(sorted(having))}"
    )


def _no_option(kind: str) -> str:
    """For a number, or the like, where the option of a group is expected."""
    given = (word for word in sys.argv[1:] if word.partition("=")[0] in _groups() and "=" in word)
    for word in given:
        group, _, value = word.partition("=")
        options = sorted(path.stem for path in (root() / "conf" / group).glob("*.yaml"))
        if options and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?|true|false|null|\[.*\]|\{.*\}", value, re.IGNORECASE):
            return (
                f"{word}: {group} is a config group; allowed: {group}={', '.join(options)}, or its keys as {group}.KEY"
            )
    return f"a config group was given no option but {kind}; allowed: GROUP=OPTION"


def _composed() -> DictConfig:
    """The configuration under the options chosen on the command line."""
    GlobalHydra.instance().clear()
    options = [word for word in sys.argv[1:] if re.split("[@=]", word)[0] in _groups() and "," not in word]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(root() / "conf")):
        try:
            return hydra.compose("config", options)
        except HydraException:  # one of the options is wrong as well
            return hydra.compose("config")


def _keys(config: DictConfig, parent: str) -> list[str]:
    """The keys below `parent` (all top-level keys for "")."""
    node = OmegaConf.select(config, parent) if parent else config
    return sorted(str(key) for key in node) if isinstance(node, DictConfig) else []


def _groups() -> list[str]:
    """The config groups of `conf/`."""
    return sorted(path.name for path in (root() / "conf").iterdir() if path.is_dir())
