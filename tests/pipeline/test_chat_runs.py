"""Runs with a chat template by the command: what is rendered is kept, and the command of docs/templates.md runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from rlhf import root
from rlhf.errors import ConfigError, DataError
from rlhf.pipeline.config import settings_of
from rlhf.pipeline.plan import Plan
from tests.helpers.chat_models import save_chat_model
from tests.helpers.command_line import run_in_process
from tests.helpers.composed_config import compose_and_check, composed_plan
from tests.helpers.tiny_tokenizers import gpt2, llama

QUICK = [
    "debug=quick", "sft.validation_size=4", "sft.batch_size=4", "sft.max_length=200", "stage=sft",
    "lora@sft.lora=none", "model.max_prompt_tokens=150",
]  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that choose a tiny chat model, its template, and a file in Alpaca's format."""
    folder = tmp_path_factory.mktemp("chat")
    model = save_chat_model("headers", folder / "model")
    rows = [{"instruction": f"Say <|eot_id|> {i}.", "output": f"It is {i}."} for i in range(12)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.root={folder}", "data.sft=sft.jsonl", "data.preference=null", "data.preference_validation=null"]
    last = ["data.prompts=sft.jsonl", "data.eval=null", "judge=none", "scorer=function", "scorer.function=builtins.len"]
    return ["model=custom", f"model.name_or_path={model}", "data=alpaca", "data/template=chat", *data, *last]


def test_what_the_model_reads_is_logged_and_kept(
    chat: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_in_process(*chat, *QUICK, "output_dir=outputs", "name=chat") == 0
    (kept,) = tmp_path.glob("outputs/chat/*/rendered.txt")
    text = kept.read_text()
    assert re.search(
        r"<\|bos\|><\|start_header_id\|>user<\|end_header_id\|>\n\nSay <\|eot_id\|> \d+\.<\|eot_id\|>", text
    )
    assert re.search(r"response \(learnt\), \d+ tokens ---\nIt is \d+\.<\|eot_id\|>\n$", text)
    said = capsys.readouterr()
    shown = [line.strip() for line in (said.out + said.err).splitlines()]  # the terminal indents further lines
    lines = [line.strip() for line in text.rstrip().splitlines()]
    assert any(shown[start : start + len(lines)] == lines for start in range(len(shown)))
    tokenizer = AutoTokenizer.from_pretrained(kept.parent / "model")
    assert tokenizer.eos_token == "<|eot_id|>"


def test_the_template_is_part_of_a_runs_identity(chat: list[str], tmp_path: Path) -> None:
    plain, same, other = (
        composed_plan(tmp_path, *chat, *more)
        for more in ([], ["data.template.system=null"], ["data.template.system=Hi"])
    )
    assert plain.sft_folder == same.sft_folder
    assert plain.sft_folder != other.sft_folder


def test_a_reward_model_on_another_model_reads_the_policys_template(chat: list[str], tmp_path: Path) -> None:
    """Prompts are in the template of the policy, so that policies with different ones have different reward models."""
    other = save_chat_model("thinking", tmp_path / "reward")
    names = {"one": "Be kind.", "two": "Be rude."}
    for name, text in names.items():
        save_chat_model("thinking", tmp_path / name)
        AutoTokenizer.from_pretrained(other).save_pretrained(tmp_path / name)
        file = tmp_path / name / "chat_template.jinja"
        file.write_text(f"{text}{file.read_text()}")
    apart = ["model@reward.model=custom", f"reward.model.name_or_path={other}", "reward.model.dtype=bfloat16"]
    plans = [
        composed_plan(tmp_path, *chat, f"model.name_or_path={tmp_path / name}", *apart, "quantization=nf4")
        for name in names
    ]
    besides = [plan.beside for plan in plans]
    assert all(besides)
    assert len({plan.sft_folder for plan in besides if plan}) == len({plan.reward_folder for plan in plans}) == 2
    # processes that Lightning starts get the configuration as it was resolved
    resolved = OmegaConf.create(plans[0].plain)
    worker = Plan(resolved, settings_of(resolved), plans[0].source, plans[0].folder)
    assert worker.reward_folder == plans[0].reward_folder


@pytest.mark.parametrize("lacking", ["gpt2", "llama"])
def test_a_reward_model_without_the_templates_tokens_is_refused(chat: list[str], lacking: str, tmp_path: Path) -> None:
    """One tokenizer would give None for them, the other `<unk>`."""
    save_chat_model("thinking", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    {"gpt2": gpt2, "llama": llama}[lacking]().save_pretrained(tmp_path)
    words = [*chat, "stage=sft", *QUICK[-3:], "model@reward.model=custom", f"reward.model.name_or_path={tmp_path}"]
    with pytest.raises(DataError, match=r"writes <\|bos\|>, <\|end_header_id\|>, .*, which the tokenizer of .* lacks"):
        compose_and_check(*words, "reward.model.max_prompt_tokens=150")


def test_mistakes_are_found_before_any_model_is_loaded(chat: list[str], tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no chat template; allowed: data\.template\.chat_template"):
        compose_and_check(*chat, *QUICK[-3:], f"data.template.name_or_path={tmp_path}")
    with pytest.raises(ConfigError, match=r"sft\.loss_on=assistant needs data/template=chat"):
        compose_and_check(*chat, *QUICK[-3:], "data/template=alpaca", "sft.loss_on=assistant")


def test_the_command_of_the_page_runs(
    chat: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = (root() / "docs/templates.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    model, folder = (
        next(part.partition("=")[2] for part in chat if part.startswith(key)) for key in ("model.n", "data.r")
    )
    command = block.replace("FOLDER_OR_HUB_ID", model).replace("FOLDER", folder)
    program, *arguments = shlex.split(command)
    monkeypatch.chdir(tmp_path)
    assert program == "rlhf"
    more = ["stage=sft", "sft.validation_size=4", "sft.warmup_steps=1", f"output_dir={tmp_path}/outputs"]
    assert run_in_process(*arguments, *chat[5:], *more) == 0
    assert "sft-" in capsys.readouterr().out
    keys = re.findall(r"^\| (`[^|]+) \|", page.partition("The keys of `data.template`")[2], re.MULTILINE)
    named = {name for key in keys for name in re.findall(r"`(\w+)`", key)}
    assert named == set(re.findall(r"^(\w+):", (root() / "conf/data/template/chat.yaml").read_text(), re.MULTILINE))
