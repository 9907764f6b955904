"""`rlhf --help`, `rlhf --help GROUP`, `rlhf --version`: what the option files say."""

import subprocess
import sys
from pathlib import Path

import pytest

import rlhf
from rlhf import reference
from rlhf.errors import ConfigError

FILES = [file for files in reference.option_files().values() for file in files]


def test_keys_have_the_names_values_and_comments_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "option.yaml"
    file.write_text(
        "# @package _global_\n# What it is for. More\n# of it.\n#\n# An aside.\ndefaults:\n  - other\n\n"
        "_target_: a.B\nlr: 1.0e-3 # peak\nempty: null\nnode: # of two\n  inner: [a, b]  # a list\n  deep: {x: 1}\n"
        "last: 'a # b'\n"
    )
    assert reference.description(file) == "What it is for. More of it."
    assert reference.summary(file) == "What it is for."
    assert reference.keys(file) == [
        ("lr", "1.0e-3", "peak"), ("empty", "null", ""), ("node.inner", "[a, b]", "a list"),
        ("node.deep", "{x: 1}", ""), ("last", "'a # b'", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_option_says_what_it_is(file: Path) -> None:
    assert reference.description(file), "a comment at the head of the file"
    assert reference.summary(file)[-1] in ".?", "its first sentence ends"


def test_help_lists_every_group_and_option_within_the_width() -> None:
    told = reference.help_text()
    for group, files in reference.option_files().items():
        assert f"  {group}: " in told
        for file in files:
            assert file.stem in told
        assert max(map(len, reference.group_text(group).splitlines())) <= reference.WIDTH
    assert max(map(len, told.splitlines())) <= reference.WIDTH
    assert "\n  ppo: as_published, default*, paper\n" in told
    assert "ppo.lr=1.0e-3" in reference.group_text("ppo")


def test_the_commands_answer_without_torch(tmp_path: Path) -> None:
    def told(*words: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from rlhf.cli import main; main(); sys.exit(3 if 'torch' in sys.modules else 0)"
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)

    assert told("--version").stdout == f"rlhf {rlhf.__version__}\n"
    done = told("--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, reference.help_text() + "\n", "")
    done = told("--help", "divergense")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "rlhf: --help divergense: there is no such group, did you mean divergence?; allowed: "
    )
    code = f"set -o pipefail; {sys.executable} -c 'from rlhf.cli import main; main()' --help | true"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="no such group"):
        reference.asked(["-h", "nothing"])
