"""Full and read-only disks: one sentence, exit code 1, and the same bits once there is space again."""

import errno
import json
import os
import resource
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.errors.machine import machine_failure, writing
from rlhf.files import aside, keep_lines, read_json, write_json
from rlhf.pipeline import run
from rlhf.pipeline.builders import sft
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.stages.ppo import PPO
from rlhf.tracking.metrics_file import JsonLines
from tests.helpers.calls import before_call
from tests.helpers.command_line import TINY, error_sentence
from tests.helpers.run_results import assert_identical, collect_results


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a tmpfs; skip the test without the right to."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> None:
    """Fill the disk to the last byte."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            with suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    assert os.statvfs(folder).f_bavail == 0


def of_ppo(_: Any, trainer: Any, stage: Any) -> bool:
    return isinstance(stage, PPO) and stage.steps_done > 1


# what is written when the disk is filled: owner, method, and the condition on its arguments
MOMENTS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "a line of metrics": (JsonLines, "log_metrics", lambda _, metrics, step=0: "sft/loss" in metrics),
    "a checkpoint of SFT": (StepCheckpoints, "save", lambda _, trainer, stage: stage.steps_done > 2),
    "a cached model": (sft, "save_model", lambda model, tokenizer, folder: True),
    "a checkpoint of PPO": (StepCheckpoints, "save", of_ppo),
    "a summary": (run, "write_summary", lambda folder, *rest: "cache" not in folder.parts),
}


@pytest.mark.long
def test_a_full_disk_ends_a_run_in_one_sentence_and_costs_no_bit(command: Callable, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert command(*TINY, f"output_dir={undisturbed}/outputs")[0] == 0
    with mounted(tmp_path / "disk", "size=32m") as disk:
        arguments = [*TINY, f"output_dir={disk}/outputs"]
        for what, (owner, name, when) in MOMENTS.items():
            with before_call(owner, name, lambda *args, when=when: fill(disk) if when(*args) else None):
                code, out, error = command(*arguments)
            assert code == 1, (what, out, error)
            assert "No space left on device" in error_sentence(out + error), what
            (disk / "filler").unlink()
            assert not list(disk.rglob(f".*.{os.getpid()}")), f"{what}: something half-written was left"
        code, out, error = command(*arguments)
        assert code == 0, out + error
        assert_identical(collect_results(disk), collect_results(undisturbed))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files that this process writes: simulates a full disk without mounting one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_completely_keeps_its_old_content(tmp_path: Path) -> None:
    path, lines = tmp_path / "summary.json", tmp_path / "metrics.jsonl"
    write_json(path, {"whole": True})
    lines.write_text(json.dumps({"step": 1, "text": "x" * 9000}) + "\n")
    before = lines.read_text()
    with largest_file(4096):
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as failure:
            write_json(path, "x" * 9000)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            keep_lines(lines, lambda _: True)
    assert machine_failure(failure.value).startswith(os.strerror(errno.EFBIG))
    assert (read_json(path), lines.read_text()) == ({"whole": True}, before)
    assert sorted(tmp_path.iterdir()) == [lines, path]


def test_only_failures_of_the_machine_are_reported_as_such() -> None:
    told = {
        OSError(errno.ENOSPC, "No space left on device", "outputs/x"): "No space left on device: outputs/x (",
        PermissionError(errno.EACCES, "Permission denied", "/cache"): "Permission denied: /cache (",
        Exception("Error while serializing: I/O error: None (os error 28)"): "No space left on device (",
    }
    for error, beginning in told.items():
        assert machine_failure(error).startswith(beginning)
        outer = RuntimeError("while saving")
        outer.__cause__ = error
        assert machine_failure(outer) == machine_failure(error)
    for error in (FileNotFoundError(errno.ENOENT, "No such file"), KeyError("x"), RuntimeError("(os error x)")):
        assert machine_failure(error) is None
    try:  # Hydra wraps errors of constructors, and rlhf.pipeline.config.instantiate unwraps them
        try:
            raise ConfigError("flip=2") from None
        except ConfigError as cause:
            raise RuntimeError("in a constructor") from cause
    except RuntimeError as wrapped:
        with pytest.raises(ConfigError) as circle:
            raise wrapped.__cause__ from None
        assert machine_failure(circle.value) is None


def test_an_output_folder_that_cannot_be_written_is_one_sentence(command: Callable, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    outputs.chmod(0o555)
    with mounted(outputs, "ro,size=1m") if os.geteuid() == 0 else nullcontext():  # root may write in any other folder
        code, out, error = command(*TINY, f"output_dir={outputs}")
    assert code == 1
    reason = "Read-only file system" if os.geteuid() == 0 else "Permission denied"
    assert error_sentence(out + error).startswith(f"rlhf: {reason}: {outputs}")


def test_a_checkpoint_is_written_beside_what_it_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))  # a $TMPDIR that cannot be written
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1, callbacks=[StepCheckpoints(tmp_path / "run" / "checkpoints", 1)],
    )  # fmt: skip
    trainer.strategy.connect(lightning.LightningModule())
    checkpoints = trainer.callbacks[-1]  # type: ignore[attr-defined]
    checkpoints.setup(trainer)
    path = tmp_path / "step-000001.ckpt"
    content = {"a": torch.arange(4096)}
    trainer.strategy.checkpoint_io.save_checkpoint(content, path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], content["a"])
    with (
        largest_file(4096),
        pytest.raises(OSError, match="File too large") as failure,
        aside(tmp_path / "big.ckpt") as to,
    ):
        trainer.strategy.checkpoint_io.save_checkpoint(content, to)
    assert machine_failure(failure.value).startswith(f"File too large: {tmp_path / 'big.ckpt'} (")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "run", path]


def test_a_failure_says_which_file_it_is_about(tmp_path: Path) -> None:
    rust = Exception("Error while serializing: I/O error: None (os error 28)")
    with pytest.raises(OSError, match="No space left") as failure, writing(tmp_path / "model"):
        raise rust
    assert machine_failure(failure.value).startswith(f"No space left on device: {tmp_path / 'model'} (")
    with pytest.raises(OSError, match="No space left") as failure, writing(tmp_path / "model"):
        raise OSError(errno.ENOSPC, "No space left on device", "elsewhere")
    assert machine_failure(failure.value).startswith("No space left on device: elsewhere (")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("x")


def test_a_database_that_fails_with_its_disk_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache.db").write_bytes(b"x" * 4096)
    with pytest.raises(sqlite3.DatabaseError) as failure, closing(sqlite3.connect(tmp_path / "cache.db")) as database:
        database.execute("CREATE TABLE a (b)")
    assert machine_failure(failure.value).startswith("an SQLite database: file is not a database (")
    with pytest.raises(sqlite3.OperationalError) as failure, closing(sqlite3.connect(":memory:")) as database:
        database.execute("SELECT * FROM nothing")
    assert machine_failure(failure.value) is None
