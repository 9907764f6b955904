"""Several processes on one cache, W&B servers that fail, and files that would run code: real processes and servers."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import wandb
from hydra.core.hydra_config import HydraConfig

from rlhf.errors import ModelError
from rlhf.files.digests import sha256
from rlhf.models.export import save_model
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.pipeline.checkpoints import StepCheckpoints, _checksum_file
from rlhf.settings import ModelSettings
from rlhf.tracking.dashboards import wandb_logger
from rlhf.tracking.metrics_file import read_metrics
from tests.helpers.command_line import TINY
from tests.helpers.tiny_models import tiny_model, word_tokenizer

KEY = "0123456789abcdef0123456789abcdef01234567"


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf", *TINY, *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.long
def test_four_processes_at_once_build_each_artefact_once(tmp_path: Path) -> None:
    """Several commands at once on one cache; two of them are the same run."""
    processes = [start(tmp_path, f"seed={seed}") for seed in (1, 2, 3, 3)]
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], said
    for built in ("training the SFT model", "training the reward model"):
        assert sum(text.count(built) for text in said) == 1, built
    assert sum("is finished already" in text for text in said) == 1
    cached = [path.parent.name.partition("-")[0] for path in (tmp_path / "outputs/cache").glob("*-*/summary.json")]
    assert sorted(cached) == ["reward", "sft"]
    assert not list((tmp_path / "outputs/cache").glob(".*.building"))
    runs = list((tmp_path / "outputs/rlhf").iterdir())
    assert len(runs) == 3
    for run in runs:
        steps = [line["step"] for line in read_metrics(run) if "ppo/reward" in line]
        assert steps == [1, 2, 3], "two processes wrote into one run"


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset W&B: it reads the environment once per process, and Lightning writes WANDB_MODE to it."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    yield
    wandb.finish()
    wandb.teardown()


def text_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.long
def test_an_unreachable_wandb_stops_no_run_and_the_key_is_nowhere(
    command: Callable,
    fresh_wandb: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setattr("rlhf.tracking.dashboards.WANDB_SECONDS", 3)
    code, out, error = command(*TINY, "logger=wandb")
    said = out + error
    assert code == 0, said
    assert "W&B cannot be used" in said
    assert list(tmp_path.rglob("wandb/offline-run-*/*.wandb"))
    assert KEY not in said
    assert KEY.encode() not in text_of(tmp_path)


class FakeWandb(BaseHTTPRequestHandler):
    """The part of the server that a run needs to start."""

    def do_POST(self) -> None:
        query = self.rfile.read(int(self.headers.get("content-length", 0)))
        project = {"id": "p", "name": "rlhf", "entity": {"id": "e", "name": "me"}}
        answer = {"data": {}}
        if b"upsertBucket" in query:
            bucket = {"id": "b", "name": "run", "displayName": "run", "config": "{}", "project": project}
            answer = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        elif b"viewer" in query:
            me = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            answer = {"data": {"viewer": me}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_wandb_that_vanishes_during_a_run_neither_stops_nor_stalls_it(
    fresh_wandb: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeWandb)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("rlhf.tracking.dashboards.WANDB_FINISH_SECONDS", 3)
    runtime = type("Runtime", (), {"runtime": type("Folder", (), {"output_dir": str(tmp_path)})})
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: runtime))
    logger = wandb_logger(project="rlhf")
    assert logger.experiment.settings.mode != "offline"
    logger.log_metrics({"ppo/reward": 1.0}, 1)
    server.shutdown()
    server.server_close()
    logger.log_metrics({"ppo/reward": 2.0}, 2)
    logger.finalize("success")
    logger.experiment.finish()  # as at the end of the process; without a time limit it would wait for the server
    assert list(tmp_path.rglob("*.wandb"))
    assert KEY.encode() not in text_of(tmp_path)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_in_a_checkpoint_folder_is_not_executed(tmp_path: Path) -> None:
    checkpoints, trace = StepCheckpoints(tmp_path, 1), tmp_path / "executed"
    sound, evil = tmp_path / "step-000001.ckpt", tmp_path / "step-000002.ckpt"
    torch.save({"state_dict": {}}, sound)
    torch.save({"state_dict": Evil(trace)}, evil)
    for path in (sound, evil):  # an attacker who can write here can write the checksum too
        _checksum_file(path).write_text(sha256(path))
    assert checkpoints.latest() == sound
    assert not trace.exists()
    torch.load(sound, weights_only=True)
    torch.save(Evil(trace), evil)
    torch.load(evil, weights_only=False)
    assert trace.exists(), "the attack itself is no attack"


def test_a_pickle_among_cached_weights_is_not_even_opened(tmp_path: Path) -> None:
    tokenizer, trace = word_tokenizer(), tmp_path / "executed"
    save_model(tiny_model(), tokenizer, tmp_path / "sft")
    (tmp_path / "sft" / "model.safetensors").unlink()
    torch.save(Evil(trace), tmp_path / "sft" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_causal_lm(ModelSettings("x", max_prompt_tokens=1), tokenizer, tmp_path / "sft")
    configured = ModelSettings("x", str(tmp_path / "sft"), max_prompt_tokens=1)
    with pytest.raises(ModelError, match="Weights only load failed"):
        load_causal_lm(configured, tokenizer)
    assert not trace.exists()


@pytest.mark.parametrize("part", ["config", "tokenizer_config"])
def test_code_beside_a_model_is_not_run_unless_asked_for(tmp_path: Path, part: str) -> None:
    trace = tmp_path / "executed"
    save_model(tiny_model(), word_tokenizer(), tmp_path / "model")
    path = tmp_path / "model" / f"{part}.json"
    mapping = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    changes = {"model_type": "evil", "tokenizer_class": "T", "auto_map": mapping}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (tmp_path / "model" / "evil.py").write_text(f"import os; os.mkdir({str(trace)!r})\n")
    model = ModelSettings("x", str(tmp_path / "model"), max_prompt_tokens=1)
    with pytest.raises(ModelError, match="custom code"):
        load_causal_lm(model, word_tokenizer()) if part == "config" else load_tokenizer(model)
    assert not trace.exists()


def test_no_code_of_the_package_unpickles() -> None:
    package = Path(__import__("rlhf").__file__).parent
    for path in package.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, path
            assert not line.strip().startswith(("import pickle", "import dill", "import joblib")), path
