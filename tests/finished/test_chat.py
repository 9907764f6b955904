"""`rlhf-chat`: its answers and scores are those of the run's models, and a shared base is in memory once."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from rlhf.data.farm import Farm
from rlhf.data.imdb import Imdb
from rlhf.errors import RunError
from rlhf.files import read_json, write_json
from rlhf.finished.chat import cli
from rlhf.finished.chat.models import ModelCache
from rlhf.finished.chat.responders import (
    Answer,
    Sampling,
    answer_together,
    labels_of,
    open_responders,
    prompt_renderer,
    reseed,
)
from rlhf.finished.run import FinishedRun
from rlhf.models.export import save_model
from rlhf.models.sequences import Sequences
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.native import NativeEngine
from tests.helpers.finished_runs import finished_outputs

PROMPT, IDS = "w9 w7", [[5, 9, 7, 6]]  # rendered with the data set's template


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return finished_outputs(tmp_path_factory.mktemp("work") / "outputs")


def last(responders: list, sampling: Sampling) -> list[Answer]:
    return list(answer_together(responders, PROMPT, sampling))[-1]


def test_greedy_answers_and_rewards_are_those_of_the_policies(runs: SimpleNamespace) -> None:
    folders = {"policy": runs.ppo, "value": runs.other, "reference": runs.sft}
    responders = open_responders([FinishedRun.open(folder) for folder in folders.values()], scored=True, seed=0)
    assert len({id(responder.policy.roles) for responder in responders}) == 1  # one copy of the SFT model
    parts = [responder.reward.parts[0][0] for responder in responders[:2] if responder.reward]
    assert parts[0] is parts[1]  # and one of the reward model
    answers = last(responders, Sampling(temperature=0, max_new_tokens=9))
    assert len({answer.text for answer in answers}) == 3
    for role, answer in zip(folders, answers, strict=True):
        made = NativeEngine(1).generate(runs.roles, role, GenerationRequest(IDS, 9, 0.0, torch.Generator()))
        ids = made.ids[0, : made.lengths[0]].tolist()
        assert answer.text == " ".join(f"w{i}" for i in ids if i > 2).strip()
        assert (answer.tokens, answer.done) == (len(ids), True)
        if role == "reference":
            assert not answer.scores
            continue
        with torch.no_grad():
            scored = runs.roles.last_token_scores("reward", Sequences.from_lists(IDS, [ids]))
        torch.testing.assert_close(torch.tensor([answer.scores["reward"]]), scored - 0.5, rtol=1e-4, atol=1e-4)


def test_answers_grow_a_token_at_a_time_and_do_not_depend_on_the_company(runs: SimpleNamespace) -> None:
    opened = [FinishedRun.open(folder) for folder in (runs.ppo, runs.other)]
    sampling = Sampling(temperature=1.5, max_new_tokens=12)
    both = open_responders(opened, scored=False, seed=3)
    steps = list(answer_together(both, PROMPT, sampling))
    counts = [step[0].tokens for step in steps]
    assert counts[:3] == [1, 2, 3]
    assert steps[-1][0].done
    assert not steps[-1][0].scores
    again = last(both, sampling)
    assert [a.text for a in again] != [a.text for a in steps[-1]]
    reseed(both, 3)
    assert last(both, sampling) == steps[-1]
    alone = open_responders(opened[1:], scored=False, seed=3)
    assert last(alone, sampling) == steps[-1][1:]


def test_full_models_and_copies_of_the_sft_model_can_chat(runs: SimpleNamespace, tmp_path: Path) -> None:
    copy = shutil.copytree(runs.sft, tmp_path / "outputs/study/stage-sft")  # the output of stage=sft
    models = ModelCache()
    parts = [models.policy(FinishedRun.open(folder)) for folder in (runs.sft, copy, runs.full)]
    assert parts[0].roles is parts[1].roles
    assert parts[2].roles is not parts[0].roles
    whole, merged = (
        last(open_responders([FinishedRun.open(folder)], scored=True, seed=0), Sampling(0, 8))[0]
        for folder in (runs.full, runs.ppo)
    )
    assert whole.text == merged.text
    assert whole.scores["reward"] == pytest.approx(merged.scores["reward"], abs=1e-4)


def test_a_whole_reward_model_scores_alike(tmp_path: Path) -> None:
    runs = finished_outputs(tmp_path / "outputs")
    before = last(open_responders([FinishedRun.open(runs.ppo)], scored=True, seed=0), Sampling(0, 8))[0]
    model = AutoModelForSequenceClassification.from_pretrained(runs.sft / "model", num_labels=1)
    model.base_model.load_state_dict(runs.roles.copy_trunk("reward").base_model.state_dict())
    head = runs.roles.heads["reward"].weight.data
    model.score.weight.data = head
    folder, summary = runs.reward, read_json(runs.reward / "summary.json")
    shutil.rmtree(folder)
    save_model(model, FinishedRun.open(runs.ppo).tokenizer(), folder / "model")
    save_file({"score.weight": head}, folder / "model/head.safetensors")
    write_json(folder / "summary.json", summary)
    after = last(open_responders([FinishedRun.open(runs.ppo)], scored=True, seed=0), Sampling(0, 8))[0]
    assert after.scores["reward"] == pytest.approx(before.scores["reward"], abs=1e-4)


def test_prompts_are_put_into_the_template_of_the_data() -> None:
    farm = Farm(demonstrations=1, comparisons=1, prompts=1, eval_prompts=2)
    assert prompt_renderer({}, farm)("Who?") == "Who?\n"
    shares = {"sft": 0.5, "prompts": 0.25, "eval": 0.25}
    nowhere = Imdb(reviews="nowhere.jsonl", shares=shares)
    assert prompt_renderer({}, nowhere)("This film") == "This film"
    texts = {"with_input": "{instruction}: {input}", "without_input": "Q: {instruction}\nA:"}
    assert prompt_renderer({"template": texts}, nowhere)("Who {are} you?") == "Q: Who {are} you?\nA:"


def test_gold_utility_is_shown_if_the_data_set_has_it(runs: SimpleNamespace) -> None:
    responder = open_responders([FinishedRun.open(runs.ppo)], scored=True, seed=0)[0]
    farm = Farm(eval_prompts=2)
    responder.utility = farm.utility
    row = farm.load("eval")[0]
    said = responder._scored(Answer("No.", 1), row["prompt"], [5], [9])
    assert said.scores["gold utility"] == farm.utility(row["prompt"], "No.")
    assert "gold utility" not in responder._scored(Answer("No.", 1), "Who knows?", [5], [9]).scores


def test_chat_reads_prompts_from_a_pipe(runs: SimpleNamespace, tmp_path: Path) -> None:
    lines = [PROMPT, "", "/seed x", "/what", "w3 " * 200, "/temperature 0", PROMPT, "/quit", "w3"]
    command = [sys.executable, "-c", "from rlhf.finished.chat.cli import main; main()", str(runs.ppo), str(runs.sft)]
    done = subprocess.run(
        [*command, "--temperature", "0"], input="\n".join(lines), capture_output=True, text=True, check=False,
        env=os.environ, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, rest = done.stdout.split("\n\n")
    assert first == second
    assert not rest
    said = first.splitlines()
    assert (said[0], said[1].split(":")[0], said[3].split(":")[0]) == (f"> {PROMPT}", "ppo", "sft-0")
    assert said[2].startswith("  (reward ")
    problems = done.stderr.splitlines()
    assert len(problems) == 3, problems
    assert "whole number" in problems[0]
    assert "there is no command /what; allowed: /seed" in problems[1]
    assert problems[2] == "ppo: the prompt has 202 tokens; allowed: 1 to 64, as in training"


def test_columns_show_the_end_while_an_answer_grows() -> None:
    console = Console(file=io.StringIO(), width=60, height=8, force_terminal=True)
    text = " ".join(f"[bold]{i}" for i in range(60))
    responders = [SimpleNamespace(label="[red]one"), SimpleNamespace(label="two")]

    def shown(done: bool) -> list[str]:
        with console.capture() as captured:
            console.print(
                cli.columns(console, responders, [Answer(text, 60, done), Answer("short", 1, done, {"reward": 2.5})])
            )
        return captured.get().splitlines()

    growing, finished = shown(False), shown(True)
    assert len(growing) <= console.height
    assert "[bold]59" in "".join(growing)
    assert "[bold]0 " not in "".join(growing)
    assert "[bold]0 " in "".join(finished)
    assert "[red]one" in finished[0]
    assert "reward 2.50, 1 token" in "".join(finished)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{ppo}/nowhere"], "there is no such folder"),
        (["{ppo}", "{reward}"], "which generates no text; allowed: stage=sft or stage=ppo"),
        (["{ppo}", "--temperature", "-1"], "a number of 0 or above"),
        (["{ppo}", "--max-new-tokens", "0"], "a whole number above 0"),
        (["{ppo}", "--seed", "1.5"], "a whole number of 0 or above"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    runs: SimpleNamespace, arguments: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([argument.format(**vars(runs)) for argument in arguments])
    assert leaving.value.code == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_broken_adapter_is_named(tmp_path: Path) -> None:
    runs = finished_outputs(tmp_path / "outputs")
    (runs.ppo / "model/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"ppo is damaged: model/adapter_model\.safetensors is not what was written"):
        open_responders([FinishedRun.open(runs.ppo)], scored=True, seed=0)


def test_labels_tell_runs_of_different_studies_apart() -> None:
    assert labels_of([Path("/o/study/kl"), Path("/o/study/none")]) == ["kl", "none"]
    assert labels_of([Path("/o/one/kl"), Path("/o/two/none")]) == ["one/kl", "two/none"]
    assert labels_of([Path("/a/s/kl"), Path("/b/s/kl")]) == ["a/s/kl", "b/s/kl"]
    assert labels_of([Path("/a/s/kl")] * 2) == ["kl", "kl"]


def test_the_page_needs_gradio(
    runs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(runs.ppo), "--web"])
    assert leaving.value.code == 2
    assert (
        capsys.readouterr().err
        == "rlhf-chat: --web needs the package gradio: pip install -e '.[web]' in the checkout\n"
    )


def test_the_page_streams_a_column_for_each_run(runs: SimpleNamespace) -> None:
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    command = [
        sys.executable,
        "-u",
        "-c",
        "from rlhf.finished.chat.cli import main; main()",
        str(runs.ppo),
        str(runs.sft),
    ]
    # in a process of its own: gradio does not recognise a generator that is wrapped by the type checker
    server = subprocess.Popen([*command, "--web", "--max-new-tokens", "6"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = next(line.split()[-1] for line in server.stdout if "http://127.0.0.1" in line)
        job = client.Client(address, verbose=False).submit(PROMPT, 0, 0, api_name="/answer")
        result = job.result(timeout=60)
    finally:
        server.terminate()
    responders = open_responders([FinishedRun.open(folder) for folder in (runs.ppo, runs.sft)], scored=True, seed=0)
    expected = last(responders, Sampling(temperature=0, max_new_tokens=6))
    said = [[turn["content"][0]["text"] for turn in column] for column in result]
    assert said == [[PROMPT, answer.text, f"*{answer.note}*"] for answer in expected]
    assert len(job.outputs()) > 2
