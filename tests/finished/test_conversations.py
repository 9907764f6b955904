"""Finished runs with a chat template: conversations in `rlhf-chat`, exports that say the same, judges."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.records import Prompt
from rlhf.errors import RunError
from rlhf.finished.chat.responders import Answer, Responder, Sampling, open_responders
from rlhf.finished.export import cli
from rlhf.finished.judge import FinishedRewardModelJudge
from rlhf.finished.run import FinishedRun
from rlhf.models.export import HEAD, save_model
from rlhf.models.loading import load_tokenizer
from rlhf.scorers import Context
from rlhf.settings import ModelSettings
from rlhf.tracking.summary import write_summary
from tests.helpers.chat_models import save_chat_model
from tests.helpers.composed_config import composed
from tests.helpers.scorer_context import NoSource, shared_roles


def _finished(folder: Path, kind: str, stage: str = "sft") -> Path:
    """A finished run of a tiny model with a chat template, whose original folder is gone."""
    origin = save_chat_model(kind, folder / "origin", seed=3)
    config = composed("data=alpaca", "data/template=chat", "model=custom", f"model.name_or_path={origin}")
    plain = OmegaConf.to_container(config, resolve=True)
    settings = ModelSettings(name="m", name_or_path=str(origin), max_prompt_tokens=99)
    source = SimpleNamespace(template=ChatTemplate(str(origin)))
    tokenizer = load_tokenizer(settings, source)  # type: ignore[arg-type]
    run = folder / kind
    if stage == "sft":
        save_model(AutoModelForCausalLM.from_pretrained(origin), tokenizer, run / "model")
    else:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(origin, num_labels=1)
        save_model(model, tokenizer, run / "model")
        save_file({"score.weight": model.score.weight.data}, run / "model" / HEAD)
    write_summary(run, {"sft/perplexity": 2.0, "reward/baseline": 0.0}, plain, time.time(), stage=stage)  # type: ignore[arg-type]
    shutil.rmtree(origin)
    return run


def _last(responder: Responder, text: str, limit: int = 12) -> Answer:
    return list(responder.answer(text, Sampling(0, limit)))[-1]


@pytest.mark.parametrize("kind", ["chatml", "headers"])
def test_lines_are_turns_of_a_conversation_until_another_begins(kind: str, tmp_path: Path) -> None:
    run = FinishedRun.open(_finished(tmp_path, kind))
    (responder,) = open_responders([run], scored=False, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model)

    def plain(messages: list[dict[str, str]]) -> str:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
        return tokenizer.decode(made, skip_special_tokens=True).rstrip("\ufffd")

    talk = [{"role": "user", "content": "Hi"}]
    first = _last(responder, "Hi").text
    assert first == plain(talk)
    talk += [{"role": "assistant", "content": first}, {"role": "user", "content": "And?"}]
    assert _last(responder, "And?").text == plain(talk)
    responder.forget()
    assert _last(responder, "And?").text == plain(talk[-1:])
    with pytest.raises(RunError, match="or /new for another conversation"):
        _last(responder, "x" * 500)


def test_an_answer_ends_at_the_end_of_the_turn_and_at_every_other_end(tmp_path: Path) -> None:
    run = FinishedRun.open(_finished(tmp_path, "headers"))
    (responder,) = open_responders([run], scored=False, seed=0)
    names = ["<|eot_id|>", "<|end_of_text|>"]
    assert list(responder.stops) == responder.tokenizer.convert_tokens_to_ids(names)


def test_an_export_talks_in_the_template_and_stops_where_the_policy_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _finished(tmp_path, "headers")
    cli.main([str(run), str(tmp_path / "export")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    asked = [{"role": "user", "content": "Hi"}]
    template = ChatTemplate(str(tmp_path / "export"))
    assert tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == template.render("Hi")
    assert tokenizer.eos_token == "<|eot_id|>"
    ends = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert model.generation_config.eos_token_id == ends
    with torch.no_grad():  # this model says an end soon
        model.lm_head.weight[ends] *= 3
    torch.manual_seed(0)
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    made = [
        model.generate(ids, do_sample=True, top_k=0, max_new_tokens=40)[0, ids.shape[1] :].tolist() for _ in range(9)
    ]
    said = [row for row in made if set(ends) & set(row)]
    assert said
    assert all(row[-1] in ends and not set(ends) & set(row[:-1]) for row in said)
    card = (tmp_path / "export/README.md").read_text()
    assert "ends a turn with `<|eot_id|>`" in card
    assert "tokenizer.apply_chat_template(messages, add_generation_prompt=True" in card
    assert template.render("{instruction}") in card
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].split("```")[0], {})  # the card's example runs as it stands


def test_a_finished_reward_model_reads_prompts_in_its_own_template(tmp_path: Path) -> None:
    judging = _finished(tmp_path, "headers", "reward")
    asked = ChatTemplate(str(save_chat_model("chatml", tmp_path / "policy")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    context = Context(NoSource(asked), tokenizer, shared_roles(), cache=tmp_path)
    judge = FinishedRewardModelJudge(context, str(judging))
    talk = [
        {"role": "user", "content": "Name <|eot_id|> a tea."},
        {"role": "assistant", "content": "Sencha."},
        {"role": "user", "content": "Another?"},
    ]
    model = AutoModelForSequenceClassification.from_pretrained(judging / "model", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(judging / "model")
    answers = [f"{word} tea{'!' * count}" for count, word in enumerate(["Assam", "Green", "No", "Mint", "Red"])]

    def score(answer: str) -> float:
        whole = [*talk, {"role": "assistant", "content": answer}]
        whole[0] = {"role": "user", "content": "Name @ a tea."}
        ids = tokenizer.apply_chat_template(whole)["input_ids"]
        (at,) = tokenizer("@")["input_ids"][-1:]
        place = ids.index(at)
        ids[place : place + 1] = tokenizer("<|eot_id|>", split_special_tokens=True, add_special_tokens=False)[
            "input_ids"
        ]
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits)

    rows = [Prompt(asked.render_messages(talk), reference_output=other) for other in answers]
    ours = answers[1:] + answers[:1]
    expected = [float(score(one) > score(other)) for one, other in zip(ours, answers, strict=True)]
    assert judge(rows, ours) == expected
    assert set(expected) == {0.0, 1.0}
