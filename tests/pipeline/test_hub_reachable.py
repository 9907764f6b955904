"""Models and data sets of the Hub are looked for once, with a short time-out; a stand-in plays the Hub."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.helpers.command_line import error_sentence

HANG = 30  # seconds


@contextmanager
def hub(status: int | None) -> Iterator[tuple[str, list[str]]]:
    """A Hub that answers every request with a status, or never (None); yields its address and what it was asked."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if status is None:
                time.sleep(HANG)
                return
            self.send_response(status)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


def rlhf(folder: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    offline = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-m", "rlhf", *arguments],
        cwd=folder,
        env={**offline, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache-of-the-hub")},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG * 4,
    )


@pytest.mark.parametrize(
    "arguments",
    ["model.name_or_path=owner/model", "model.name_or_path=nosuch dry_run=true",
     "-m model.name_or_path=owner/model,owner/other seed=1,2"],
)  # fmt: skip
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, arguments: str) -> None:
    with hub(None) as (address, asked):
        done = rlhf(tmp_path, address, *arguments.split())
    assert done.returncode == 2, done.stdout + done.stderr
    said = error_sentence(done.stderr)
    assert said.startswith("rlhf: model.name_or_path=")
    assert "neither here nor in the local cache, and the Hub cannot be reached" in said
    assert len([path for path in asked if "/api/models/" in path]) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_model_that_the_hub_does_not_have(tmp_path: Path) -> None:
    with hub(404) as (address, _):
        done = rlhf(tmp_path, address, "model.name_or_path=owner/modle", "dry_run=true")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "model.name_or_path=owner/modle is not here, and the Hub has no such model" in error_sentence(done.stderr)


def test_a_data_set_that_the_hub_does_not_have(tmp_path: Path) -> None:
    with hub(404) as (address, _):
        done = rlhf(tmp_path, address, "data=hub", "data.sft=owner/rows@main:test", "judge=none", "stage=sft")
    assert done.returncode == 2, done.stdout + done.stderr
    said = error_sentence(done.stderr)
    assert "data: owner/rows@main:test is not here, and the Hub has no such dataset" in said


@pytest.mark.slow
def test_a_dry_run_may_name_what_cannot_be_looked_for(tmp_path: Path) -> None:
    with hub(None) as (address, asked):
        done = rlhf(tmp_path, address, "model.name_or_path=owner/model", "dry_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "so that it is not known whether it has owner/model" in done.stderr
    assert "owner/model, to be fetched" in done.stdout
    assert len([path for path in asked if "/api/models/" in path]) == 1
