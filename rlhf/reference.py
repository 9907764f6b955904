"""What the option files say about themselves: `rlhf --help`, and the configuration reference of the docs.

A comment at the head of a file describes the option, and a comment behind a key describes the key. Does not import
torch.
"""

import re
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from rlhf import __version__, root
from rlhf.errors import ConfigError

STUDIES = ("experiments", "sweeps")  # groups that live beside `conf`, and whose options are whole studies or axes
PURPOSE = "RLHF experiments: fine-tuning, a reward model and LoRA-PPO, composed from options and keys."
EXAMPLES = {
    "rlhf": "the main job: all three stages in the embedded miniature world",
    "rlhf divergence=jensen_shannon kl.coef=0.1": "another option of a group, another value of a key",
    "rlhf -m lora=r8,r64 replicate=1,2,3": "every combination, each on three whole pipelines",
    "rlhf -m experiments=table1 dry_run=true": "what a study would run, and what is done already",
    "rlhf stage=evaluate policy=RUN judge=gold": "measure a finished policy again",
}
COMMANDS = {
    "rlhf-status FOLDER": "how far a study is",
    "rlhf-report FOLDER": "its tables, figures and page",
    "rlhf-chat RUN…": "talk with policies",
    "rlhf-compare POLICY…": "judge policies against each other",
    "rlhf-agreement FILE": "how far two judges agree",
    "rlhf-export RUN FOLDER": "a model for plain transformers",
    "rlhf-sync FOLDER": "upload offline W&B runs",
}
LAST = "rlhf --help GROUP lists the keys of a group, and rlhf --cfg job prints the composed configuration."
WIDTH = 100
_KEY = re.compile(r"""^( *)([\w@/.-]+):(?: +('[^']*'|"[^"]*"|.*?))?(?:\s+# (.*))?$""")


class Key(NamedTuple):
    """A key of an option file: its dotted name, its value as written, and what the comment says."""

    name: str
    value: str
    comment: str


def option_files() -> dict[str, list[Path]]:
    """Group → its option files; a group within a group is called `data/template`."""
    found: dict[str, list[Path]] = {}
    for place in (root() / "conf", *(root() / name for name in STUDIES)):
        base = place if place.name == "conf" else place.parent
        for file in sorted(place.rglob("*.yaml")):
            group = str(file.parent.relative_to(base))
            if group != ".":
                found.setdefault(group, []).append(file)
    return found


def description(file: Path) -> str:
    """The comment at the head of an option file: its first paragraph."""
    lines: list[str] = []
    for line in file.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        lines.append(line[2:].strip())
    return " ".join(lines)


def summary(file: Path) -> str:
    """The first sentence of an option's description, or the keys that it sets if it has none."""
    text = description(file)
    if text:
        return re.split(r"(?<=[.?!])\s+(?=[A-Z])", text)[0]
    return ", ".join(f"{key.name}={key.value}" for key in keys(file) if key.name[0] not in "_d")[:WIDTH]


def keys(file: Path) -> list[Key]:
    """The keys of an option file in their order, those of a nested node with its name in front."""
    found: list[Key] = []
    above: list[tuple[int, str]] = []
    for line in file.read_text().splitlines():
        match = _KEY.match(line)
        if match is None:
            continue
        indent, name, value, comment = len(match[1]), match[2], match[3] or "", match[4] or ""
        if value.startswith("# "):
            value, comment = "", value[2:]
        above = [entry for entry in above if entry[0] < indent]
        dotted = ".".join([*(name for _, name in above), name])
        if value:
            found.append(Key(dotted, value, comment))
        else:
            above.append((indent, name))
    return [key for key in found if not key.name.startswith(("defaults", "_target_"))]


def defaults() -> dict[str, str]:
    """Group → the option that is chosen if the command line names none."""
    chosen = OmegaConf.to_container(OmegaConf.load(root() / "conf" / "config.yaml"))["defaults"]  # type: ignore[index, call-overload]
    pairs = (item for entry in chosen if isinstance(entry, dict) for item in entry.items())
    return {str(group): str(option) for group, option in pairs}


def run_keys() -> list[Key]:
    """The keys of `conf/config.yaml` itself, which belong to no group."""
    return [key for key in keys(root() / "conf" / "config.yaml") if not key.name.startswith("hydra.")]


def asked(words: Sequence[str]) -> str | None:
    """What `rlhf WORDS…` should print instead of doing a run, for `--help`, `--help GROUP` and `--version`.

    Raises:
        ConfigError: there is no such group.
    """
    if "--version" in words:
        return f"rlhf {__version__}"
    if not {"--help", "-h"} & set(words):
        return None
    named = next((word for word in words if re.fullmatch(r"[\w/]+", word)), None)
    if named is None:
        return help_text()
    groups = option_files()
    if named not in groups:
        near = get_close_matches(named, groups, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--help {named}: there is no such group{hint}; allowed: {', '.join(groups)}")
    return group_text(named)


def help_text() -> str:
    """What `rlhf --help` prints: purpose, examples, commands, and the groups with their options."""
    lines = [PURPOSE, "", *_columns(EXAMPLES), "", "Other commands", *_columns(COMMANDS), ""]
    lines += ["Groups (GROUP=OPTION; * is the default)"]
    chosen = defaults()
    for group, files in option_files().items():
        names = [f"{file.stem}*" if chosen.get(group) == file.stem else file.stem for file in files]
        lines += textwrap.wrap(f"  {group}: {', '.join(names)}", WIDTH, subsequent_indent=" " * 6)
    main = _columns({key.name: key.comment for key in run_keys()})
    return "\n".join([*lines, "", "Keys of a run", *main, "", LAST])


def group_text(group: str) -> str:
    """What `rlhf --help GROUP` prints: its options with a line each, and the keys of the default one."""
    files = option_files()[group]
    lines = [f"{group}: one of", *_columns({file.stem: summary(file) for file in files})]
    chosen = next((file for file in files if file.stem == defaults().get(group)), files[0])
    listed = [] if "# @package" in chosen.read_text() else keys(chosen)  # such an option sets keys of other groups
    if listed:
        lines += ["", f"Keys, with the values of {group}={chosen.stem}"]
        lines += _columns({f"{group.split('/')[0]}.{key.name}={key.value}": key.comment for key in listed})
    return "\n".join(lines)


def _columns(entries: dict[str, str]) -> list[str]:
    """Names and texts in two columns; a name that is too long has its text on the next line."""
    left = min(44, max((len(name) for name in entries), default=0))
    lines: list[str] = []
    for name, text in entries.items():
        first, rest = f"  {name:{left}}  ", " " * (left + 4)
        if len(name) > left:
            lines.append(f"  {name}")
            first = rest
        lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
    return lines
