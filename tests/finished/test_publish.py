"""`rlhf-export`: exported models load in plain transformers and compute the same, and the model card is complete."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.files import read_json
from rlhf.finished.export import cli
from rlhf.finished.export.card import hub_datasets, shareable
from rlhf.models.sequences import Sequences
from tests.helpers.finished_runs import finished_outputs, move_outputs, run_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return finished_outputs(tmp_path_factory.mktemp("work") / "outputs")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run an export that is refused and return its one-sentence error message."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()  # discard the progress bars of the fixtures
        with pytest.raises(SystemExit) as leaving:
            cli.main([str(argument) for argument in arguments])
        assert leaving.value.code == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert said.startswith("rlhf-export: "), said
        return said

    return run


def export(*arguments: object) -> Path:
    cli.main([str(argument) for argument in arguments])
    return Path(str(arguments[1]))


def test_a_merged_policy_has_the_logits_of_base_and_adapter(
    runs: SimpleNamespace, make_texts: Callable, tmp_path: Path
) -> None:
    batch: Sequences = make_texts(4, seed=0)
    folder = export(runs.ppo, tmp_path / "merged")
    with torch.no_grad():
        expected = runs.roles.output("policy")(runs.roles.hidden("policy", batch))
        plain = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(plain(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)
        reference = runs.roles.output("reference")(runs.roles.hidden("reference", batch))
    assert (expected - reference).abs().max() > 0.1  # the adapter changes the output
    assert AutoTokenizer.from_pretrained(folder)("w3 w9")["input_ids"] == [3, 9]
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    whole, rounded = (load_file(path / "model.safetensors") for path in (folder, export(
        runs.ppo, tmp_path / "rounded", "--dtype", "bfloat16")))  # fmt: skip
    assert all(torch.equal(whole[key].bfloat16(), rounded[key]) for key in whole | rounded)
    full = AutoModelForCausalLM.from_pretrained(export(runs.full, tmp_path / "full"))
    with torch.no_grad():
        torch.testing.assert_close(full(input_ids=batch.ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_reward_model_scores_as_in_the_run(runs: SimpleNamespace, make_texts: Callable, tmp_path: Path) -> None:
    batch = make_texts(4, seed=1)
    folder = export(runs.reward, tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inside = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        got = model(input_ids=batch.ids.where(inside, 0), attention_mask=inside.long()).logits.squeeze(-1)
        torch.testing.assert_close(got, runs.roles.last_token_scores("reward", batch), rtol=1e-4, atol=1e-5)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "reward-model" in card.data.tags
    assert "demonstrations score 0.500 on average" in card.text


def test_an_adapter_is_exported_after_the_outputs_were_moved(
    make_texts: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = move_outputs(finished_outputs(tmp_path / "outputs"), tmp_path / "moved")
    folder = export(runs.ppo, tmp_path / "adapter", "--adapter")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".md", ".safetensors"}
    assert not (folder / "model.safetensors").exists()
    batch = make_texts(2, seed=0)
    with torch.no_grad():
        expected = runs.roles.output("policy")(runs.roles.hidden("policy", batch))
        got = AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=batch.ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    published = export(runs.ppo, tmp_path / "published", "--adapter", "--base", "me/sft", "--dtype", "bfloat16")
    assert read_json(published / "adapter_config.json")["base_model_name_or_path"] == "me/sft"
    assert {value.dtype for value in load_file(published / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert str(tmp_path) not in "".join(path.read_text() for path in published.glob("*.[jm]*"))
    card = ModelCard.load(published / "README.md").data
    assert (card.library_name, card.base_model, card.base_model_relation) == ("peft", "me/sft", "adapter")


def test_the_card_says_what_was_trained_how(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "out"
    cli.main([str(runs.ppo), str(folder), "--license", "mit", "--push", "me/it", "--private", "--dry-run"])
    said = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "would push it to me/it (private)" in said
    card = ModelCard(said, ignore_metadata_errors=False)
    assert card.data.license == "mit"
    assert {"rlhf", "ppo", "lora"} <= set(card.data.tags)
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("win_rate", 0.5), ("reward", 0.25)]
    settings = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert settings["ppo"]["steps"] == run_config()["ppo"]["steps"]
    for text in ("| win rate (%) | 25.0 | 50.0 |", "clamped_kl, coefficient 0.05", "w5 {instruction} w6",
                 "| reward model |", "transformers"):  # fmt: skip
        assert text in card.text, text


def test_the_card_names_the_hubs_data_and_no_place_of_this_machine() -> None:
    assert list(hub_datasets(run_config("data=alpaca_farm")["data"])) == ["tatsu-lab/alpaca_farm"] * 5
    assert list(hub_datasets(run_config("data=imdb")["data"])) == ["stanfordnlp/imdb"]
    pinned = "data.sft={source: a/b@v1:en, columns: {prompt: q}}"
    hub = run_config("data=hub", pinned, "data.eval=hf://datasets/c/d@main/file.json")["data"]
    assert sorted(hub_datasets(hub)) == ["a/b", "c/d"]
    assert sorted(hub_datasets({"parts": {"one": hub}, "weights": {"one": 1}})) == ["a/b", "c/d"]
    assert not list(hub_datasets(run_config("data=alpaca")["data"]))
    assert not list(hub_datasets(run_config("data=stack_exchange", "data.sources=dumps/Posts.xml")["data"]))
    told = shareable(
        {"root": "/home/someone/data", "client": {"base_url": "http://inside"}, "sft": ["a/b.json", "~/c/d"]}
    )
    assert told == {"root": "data", "sft": ["a/b.json", "d"]}


def test_the_card_names_the_licence_of_the_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    runs = finished_outputs(
        tmp_path / "outputs", "model=custom", "model.dtype=float32", f"model.name_or_path={tmp_path}/base"
    )
    cli.main([str(runs.sft), str(tmp_path / "out"), "--dry-run"])
    said = capsys.readouterr().out
    assert ModelCard(said).data.license == "apache-2.0"
    assert str(tmp_path / "base") not in said


def test_mistakes_are_told_in_a_sentence(
    runs: SimpleNamespace, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    out = tmp_path / "out"
    assert "no such folder" in refused(tmp_path / "nowhere", out)
    assert "holds no summary.json" in refused(runs.ppo.parent, out)
    assert "exists already" in refused(runs.ppo, tmp_path)
    assert "has no adapter" in refused(runs.full, out, "--adapter")
    assert "allowed: OWNER/NAME" in refused(runs.ppo, out, "--push", "me/../it")
    assert "allowed: OWNER/NAME" in refused(runs.ppo, out, "--push", "it")
    assert "name it by --base" in refused(runs.ppo, out, "--adapter", "--push", "me/it")
    assert "with --push" in refused(runs.ppo, out, "--private")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "hf auth login" in refused(runs.ppo, out, "--push", "me/it")
    assert not out.exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = finished_outputs(tmp_path / "outputs")
    adapter = runs.ppo / "model/adapter_model.safetensors"
    tensors = load_file(adapter)
    tensors.pop(min(tensors))
    save_file(tensors, adapter)
    (runs.ppo / "checksums.json").unlink()  # as written by an earlier version
    assert "missing adapter keys" in refused(runs.ppo, tmp_path / "out")
    adapter.write_bytes(adapter.read_bytes()[:-8])
    assert "adapter_model.safetensors is not what was written" in refused(runs.ppo, tmp_path / "out")

    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_card", stopped)  # the last file that is written
    with pytest.raises(SystemExit) as leaving:
        export(runs.full, tmp_path / "out")
    assert leaving.value.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (runs.sft / "summary.json").unlink()
    moved = move_outputs(runs, tmp_path / "moved")
    assert "not in the cache beside it" in refused(moved.other, tmp_path / "out")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's API that an upload of small files needs; uploaded files are in `received`."""

    received: dict[str, object]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).received[self.path] = body.decode()
        answer: dict[str, object] = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"http://{self.headers['Host']}/me/it"}
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            answer = {"files": [{**file, "shouldIgnore": False} for file in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"http://{self.headers['Host']}/me/it/commit/0", "commitOid": "0"}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.received = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_pushing_sends_the_exported_folder(
    runs: SimpleNamespace,
    hub: ThreadingHTTPServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    address = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    export(runs.ppo, tmp_path / "out", "--push", "me/it", "--private")
    assert capsys.readouterr().out.split() == [str(tmp_path / "out"), f"{address}/me/it"]
    created = json.loads(str(Hub.received["/api/repos/create"]))
    assert (created["organization"], created["name"], created["visibility"]) == ("me", "it", "private")
    lines = str(Hub.received["/api/models/me/it/commit/main"]).splitlines()
    sent = {line["value"]["path"] for line in map(json.loads, lines) if line["key"] == "file"}
    assert sent == {path.name for path in (tmp_path / "out").iterdir()}


def test_a_push_that_fails_keeps_the_folder(
    runs: SimpleNamespace, tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    said = refused(runs.ppo, tmp_path / "out", "--push", "me/it", code=1)  # the tests run offline
    assert "me/it could not be pushed (" in said
    assert f"`hf upload me/it {tmp_path}/out` tries again" in said
    assert (tmp_path / "out/model.safetensors").exists()
