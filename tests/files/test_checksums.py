"""Damage to finished models and summaries is detected and named; the files are moved aside and built again."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import DamagedError, ModelError, RunError
from rlhf.files import CHECKSUMS, SUMMARY, checksums, read_object, write_json
from rlhf.files.checksums import damage, seal
from rlhf.finished.run import FinishedRun
from rlhf.pipeline import cache
from rlhf.tracking.summary import read_summary
from tests.helpers.finished_runs import finished_outputs

HEADER = b'{"a":{"dtype":"F32","shape":[25],"data_offsets":[0,100]}}'.ljust(64)
WEIGHTS = b"\x40\0\0\0\0\0\0\0" + HEADER + bytes(range(100))


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has checked, as a new process would."""
    monkeypatch.setattr(checksums, "_sound", {})


def build(folder: Path, stage: str = "sft", sealed: bool = True) -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "model" / "config.json").write_text("{}")
    if sealed:
        seal(folder)
    write_json(folder / SUMMARY, {"stage": stage, "metrics": {"reward/baseline": 1.5}})


def zeros(folder: Path) -> None:
    """Change a byte in the middle of a file; keep its size and its modification time."""
    path = folder / "model" / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-30, os.SEEK_END)
        file.write(bytes(20))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGE: dict[str, tuple[Any, str]] = {
    "zeros": (zeros, "model/model.safetensors is not what was written"),
    "a file gone": (lambda folder: (folder / "model" / "config.json").unlink(), "model/config.json is gone"),
    "the model gone": (lambda folder: shutil.rmtree(folder / "model"), "model is gone"),
    "no object": (lambda folder: (folder / SUMMARY).write_text("[]"), f"{SUMMARY} is damaged: it holds no JSON object"),
    "empty": (lambda folder: (folder / SUMMARY).write_text("{}"), f"{SUMMARY} is damaged: it does not say 'metrics'"),
    "torn": (lambda folder: (folder / SUMMARY).write_text('{"stage": "sf'), f"{SUMMARY} is damaged: it is not JSON"),
    "binary": (lambda folder: (folder / SUMMARY).write_bytes(b"\xff\xfe\0"), f"{SUMMARY} is damaged: it is not JSON"),
    "no summary": (lambda folder: (folder / SUMMARY).unlink(), f"{SUMMARY} is gone"),
    "checksums": (lambda folder: (folder / CHECKSUMS).write_text("[]"), f"{CHECKSUMS} is damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_cached_model_is_kept_aside_and_built_again(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache.ensure(tmp_path / "cache" / "sft-1", build)
    assert not cache.missing(folder)
    checksums._sound.clear()
    DAMAGE[what][0](folder)
    assert cache.missing(folder)
    with caplog.at_level(logging.WARNING):
        cache.ensure(folder, build)
    assert not cache.missing(folder)
    assert (folder / "model" / "model.safetensors").read_bytes() == WEIGHTS
    assert DAMAGE[what][1] in caplog.text
    assert (folder.parent / "damaged" / "sft-1").is_dir()
    assert str(folder.parent / "damaged" / "sft-1") in caplog.text
    zeros(folder)
    cache.ensure(folder, build)
    assert (folder.parent / "damaged" / "sft-1-2").is_dir()


def test_a_reward_model_without_its_baseline_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "reward-1").mkdir()
    build(tmp_path / "reward-1", "reward")
    assert not cache.missing(tmp_path / "reward-1")
    write_json(tmp_path / "reward-1" / SUMMARY, {"stage": "reward", "metrics": {}})
    assert cache.missing(tmp_path / "reward-1")


def test_what_an_earlier_version_left_gets_its_checksums_on_first_use(tmp_path: Path) -> None:
    build(tmp_path, sealed=False)
    assert damage(tmp_path) is None
    assert set(read_object(tmp_path / CHECKSUMS)) == {"model/model.safetensors", "model/config.json"}
    zeros(tmp_path)
    assert damage(tmp_path) is not None
    (tmp_path / CHECKSUMS).unlink()
    for content in (WEIGHTS[:-1], WEIGHTS + b"x", b"", bytes(len(WEIGHTS))):
        (tmp_path / "model" / "model.safetensors").write_bytes(content)
        assert damage(tmp_path) == "model.safetensors is cut short or overwritten"


def test_a_file_is_read_again_only_where_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    read: list[str] = []
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path.name) or "0")
    assert damage(tmp_path) is None
    assert read == []
    os.utime(tmp_path / "model" / "config.json")
    assert damage(tmp_path) is not None
    assert read == ["config.json"]


def test_a_copy_is_checked_once_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    build(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert damage(tmp_path / "b") is None
    monkeypatch.setattr(checksums, "_sound", {})
    monkeypatch.setattr(checksums, "sha256", lambda path: pytest.fail("read again"))
    assert damage(tmp_path / "b") is None


def test_a_damaged_finished_run_is_one_sentence_for_every_command(tmp_path: Path) -> None:
    runs = finished_outputs(tmp_path)
    assert FinishedRun.open(runs.ppo).base == runs.sft / "model"
    path = runs.sft / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"sft-0 is damaged: model/model\.safetensors is not what was written"):
        _ = FinishedRun.open(runs.ppo).base
    path = runs.ppo / "model" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RunError, match=r"ppo is damaged: model/adapter_model\.safetensors"):
        FinishedRun.open(runs.ppo)
    with pytest.raises(ModelError, match="ppo is the same run, but damaged"):
        cache.check_whole(runs.ppo)


@pytest.mark.parametrize("content", ["[]", "{}", '{"a', "17"])
def test_a_malformed_summary_is_refused_with_its_path(content: str, tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text(content)
    with pytest.raises(DamagedError, match=str(tmp_path / SUMMARY)):
        read_summary(tmp_path)
    with pytest.raises(DamagedError, match=str(tmp_path / SUMMARY)):
        FinishedRun.open(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"folder": 1}', '{"fol', json.dumps({"folder": "../../run"})])
def test_a_damaged_pointer_is_left_out_with_its_name(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SUMMARY).write_text("{}")
    pointer = tmp_path / "cache" / "runs" / "abc.json"
    pointer.parent.mkdir(parents=True)
    pointer.write_text(content)
    assert cache.find_run(tmp_path, "abc") is None
    assert str(pointer) in caplog.text
