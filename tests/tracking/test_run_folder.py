"""A run's folder is made when the run begins: typing errors and dry runs leave nothing, and touch nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command_line import TINY


@pytest.mark.parametrize(
    "arguments",
    ["ppo.steps=abc", "+ppo.foo=3", "judge=null", "-m seed=1,2 ppo.steps=3,abc", "-m seed=1,2 +ppo.foo=3"],
)
def test_a_typing_error_is_found_before_a_folder_is_made(command: Callable, tmp_path: Path, arguments: str) -> None:
    code, _, err = command(*arguments.split())
    assert code == 2, err
    assert err.count("rlhf: ") == 1
    assert not list(tmp_path.iterdir())


def test_settings_that_contradict_each_other_leave_no_folder(command: Callable, tmp_path: Path) -> None:
    code, _, err = command("sft.packing=joined")
    assert code == 2, err
    assert not list(tmp_path.iterdir())


def test_values_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from rlhf.cli import main; sys.argv = ['rlhf', 'ppo.steps=abc']\n"
        "try:\n    main()\nexcept SystemExit as leaving:\n    print(leaving.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_folders_that_were_there_before_stay(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    assert command("sft.packing=joined")[0] == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["outputs"]


@pytest.mark.slow
def test_what_a_run_was_composed_from_is_written_once(command: Callable, tmp_path: Path) -> None:
    # 1. dry runs, of one run and of a sweep, before there is anything
    for arguments in (["dry_run=true"], ["-m", "dry_run=true", "seed=1,2"]):
        code, _, err = command(*arguments, *TINY, "stage=sft")
        assert code == 0, err
        assert not list(tmp_path.iterdir())
    # 2. the run
    assert command(*TINY, "stage=sft", "name=once")[0] == 0
    (folder,) = (tmp_path / "outputs" / "once").iterdir()
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    written = {path.name: text.decode() for path, text in kept.items() if path.parent.name == ".hydra"}
    assert set(written) == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert "name=once" in written["overrides.yaml"]
    assert "training the SFT model" in (folder / "cli.log").read_text()
    # 3. a dry run of it, and the same run with another key that changes no result
    assert command(*TINY, "stage=sft", "name=once", "dry_run=true")[0] == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept
    assert command(*TINY, "stage=sft", "name=once", "guards=strict")[0] == 0
    assert {path.name: path.read_text() for path in (folder / ".hydra").iterdir()} == written
    assert len((folder / "cli.log").read_text()) >= len(kept[folder / "cli.log"])
