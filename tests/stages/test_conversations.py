"""Supervised fine-tuning on conversations: the loss is on the assistant's turns, as if each were a row of its own."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.records import Comparison, Demonstration, SampledComparison
from rlhf.models.assembly import sft_roles
from rlhf.models.loading import load_tokenizer
from rlhf.models.tokenizing import keep_template
from rlhf.settings import LoraSettings, RewardSettings, SFTSettings
from rlhf.stages.batches import SeededBatches
from rlhf.stages.reward import RewardModeling
from rlhf.stages.sft import SupervisedFineTuning
from tests.helpers.chat_models import save_chat_model, save_chat_tokenizer
from tests.helpers.ppo_stages import ppo_settings
from tests.helpers.tiny_models import tiny_roles
from tests.helpers.training import fit, record_gradients

TALKS = [["Name a tea.", "Sencha.", "Another?", "Assam."], ["Hi", "Hello!", "Bye", "See you."], ["Yes?", "No."]]


@pytest.fixture(scope="module", params=["chatml", "headers", "brackets"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(request.param, tmp_path_factory.mktemp("model"))


def _rows(template: ChatTemplate, talks: list[list[str]]) -> list[Demonstration]:
    rows = []
    for texts in talks:
        roles = ("user", "assistant") * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        rows.append(Demonstration(template.render_messages(messages[:-1]), texts[-1]))
    return rows


def _gradients(model: Path, talks: list[list[str]], folder: Path, **options: Any) -> tuple[list, float]:
    settings = replace(ppo_settings(), sft=SFTSettings(
        lora=LoraSettings(r=0), epochs=1, batch_size=9, max_length=300, lr=1e-3, max_grad_norm=1e9, log_every=1,
        **options,
    ))  # fmt: skip
    settings.model.name_or_path = str(model)
    template = ChatTemplate(str(model))
    tokenizer = load_tokenizer(settings.model, SimpleNamespace(template=template))  # type: ignore[arg-type]
    stage = SupervisedFineTuning(settings.sft, sft_roles(settings, tokenizer, None), tokenizer, 1)
    rows = stage.encode(_rows(template, talks))
    with record_gradients() as seen:
        metrics = fit(stage, rows, SeededBatches(len(rows), len(rows), 0, 1), folder)
    return seen[0], metrics[-1]["sft/loss"]


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_on_all_turns_is_that_of_a_row_for_each(folder: Path, packing: bool, tmp_path: Path) -> None:
    each = [talk[:end] for talk in TALKS for end in range(2, len(talk) + 1, 2)]
    assert len(each) == 5
    expected, loss = _gradients(folder, each, tmp_path / "each", loss_on="response")
    got, same = _gradients(folder, TALKS, tmp_path / "all", loss_on="assistant", packing=packing)
    _, last = _gradients(folder, TALKS, tmp_path / "last", loss_on="response")
    assert same == pytest.approx(loss, rel=1e-5)
    assert last != pytest.approx(loss, rel=1e-4)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_reward_model_reads_answers_as_the_template_writes_them(tmp_path: Path) -> None:
    """What the template writes before an answer is read with a demonstration, but was sampled with a sample."""
    template = ChatTemplate(str(save_chat_tokenizer("thinking", tmp_path)))
    settings = RewardSettings(lora=LoraSettings(r=0), epochs=1, batch_size=1, max_length=300, lr=1e-3)
    tokenizer = keep_template(AutoTokenizer.from_pretrained(tmp_path), SimpleNamespace(template=template))
    stage = RewardModeling(settings, tiny_roles(), tokenizer, 1)
    prompt = template.render("Hi")
    written, sampled = stage.encode([Comparison(prompt, "a", "b"), SampledComparison(prompt, "a", "b", True, False)])
    thoughts = "<think>\n\n</think>\n\n"
    assert [tokenizer.decode(ids) for _, ids in written] == [f"{thoughts}a<|im_end|>", f"{thoughts}b<|im_end|>"]
    assert [tokenizer.decode(ids) for _, ids in sampled] == ["a<|im_end|>", "b"]
