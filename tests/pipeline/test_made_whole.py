"""A damaged finished run whose summary is moved away is made whole by its own command."""

import shutil
from pathlib import Path

import pytest

from rlhf.files import EARLIER, KEPT, MODEL, SUMMARY
from rlhf.files.checksums import damage
from rlhf.files.digests import sha256
from tests.helpers.command_line import TINY, run_in_process

pytestmark = pytest.mark.slow


def weights(folder: Path) -> str:
    return sha256(folder / MODEL / "adapter_model.safetensors")


def test_a_damaged_run_without_its_summary_is_made_whole(tmp_path: Path) -> None:
    """From its checkpoint, where damaged kept policies do not become sound; or from the start, without what it was."""
    folder = tmp_path / "outputs/mended/run"
    again = [*TINY, "ppo.eval_every=2", f"output_dir={tmp_path}/outputs", f"hydra.run.dir={folder}"]
    assert run_in_process(*again, "ppo.keep_evaluated=true") == 0
    before = weights(folder)
    for path in (folder / MODEL, folder / KEPT / "step-000002"):
        (path / "adapter_model.safetensors").write_bytes(b"")
    (folder / SUMMARY).unlink()
    assert run_in_process(*again) == 0
    assert weights(folder) == before
    assert [path.name for path in (folder / KEPT).iterdir()] == ["step-000003"]
    assert (folder / "damaged/step-000002").is_dir()
    assert damage(folder) is None
    shutil.rmtree(folder / "checkpoints")
    (folder / SUMMARY).unlink()
    assert run_in_process(*again) == 0
    assert not (folder / KEPT).exists()
    [aside] = (folder / EARLIER).iterdir()
    assert (aside / KEPT / "step-000003").is_dir()
    assert weights(folder) == weights(aside) == before
