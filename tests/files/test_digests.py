"""Digests of files depend on their content, not on their modification times."""

import hashlib
import os
from pathlib import Path

import pytest

from rlhf.files import CHECKSUMS, MODEL, digests
from rlhf.files.checksums import damage, seal
from rlhf.files.digests import content_digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"first")
    return path


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache digests at once, as if every file were old."""
    monkeypatch.setattr(digests, "RACY_SECONDS", -1.0)
    return tmp_path / "known"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_digest_depends_on_the_bytes_of_a_file(file: Path, known: Path) -> None:
    assert content_digest(file) == content_digest(file, known) == content_digest(file, known) == sha(b"first")


def test_a_file_is_read_once(file: Path, known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content_digest(file, known)
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert content_digest(file, known) == sha(b"first")


def test_an_edit_of_the_same_size_that_keeps_the_time_is_seen(file: Path, known: Path) -> None:
    content_digest(file, known)
    stat = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_digest(file, known) == sha(b"other")


def test_a_file_that_changed_a_moment_ago_is_not_trusted(file: Path, tmp_path: Path) -> None:
    content_digest(file, tmp_path / "known")
    assert not (tmp_path / "known").exists()


@pytest.mark.parametrize("garbage", [b"", b"17", b"[]", b'{"stamp": 1}', b"\xff"])
def test_damaged_notes_are_not_read(file: Path, known: Path, garbage: bytes) -> None:
    content_digest(file, known)
    (note,) = known.iterdir()
    note.write_bytes(garbage)
    assert content_digest(file, known) == sha(b"first")


def test_a_folder_that_cannot_be_written_does_not_matter(file: Path, known: Path) -> None:
    known.write_bytes(b"a file where a folder should be")
    assert content_digest(file, known) == sha(b"first")


def test_a_folder_is_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "config.json").write_bytes(b"{}")
        (folder / "weights").write_bytes(b"x")
    assert content_digest(one) == content_digest(other)
    (other / ".lock").touch()
    assert content_digest(one) == content_digest(other)
    (other / "weights").rename(other / "renamed")
    assert content_digest(one) != content_digest(other)


def test_the_digest_of_a_run_is_that_of_its_weights_whenever_they_were_checked(tmp_path: Path, known: Path) -> None:
    """A reward model that judges is named by its folder; a copy or a `touch` of its weights makes it no other one."""
    run = tmp_path / "reward-1"
    (run / MODEL).mkdir(parents=True)
    weights = run / MODEL / "weights"
    weights.write_bytes(b"x")
    seal(run)
    before = content_digest(run, known)
    stamps = (run / CHECKSUMS).read_bytes()
    os.utime(weights, (1, 1))
    assert damage(run) is None
    assert (run / CHECKSUMS).read_bytes() != stamps
    assert content_digest(run, known) == before
    weights.write_bytes(b"y")
    seal(run)
    assert content_digest(run, known) != before
    (run / CHECKSUMS).write_bytes(b"[]")
    assert content_digest(run, known) not in (before, "")
