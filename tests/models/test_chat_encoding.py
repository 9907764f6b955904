"""Conversations as token ids: transformers' own, whatever the contents say, with one BOS and the turn's own end."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from rlhf.data.chat_template import ChatTemplate
from rlhf.models.loading import load_tokenizer
from rlhf.models.tokenizing import encode, encode_answers, encode_pairs, keep_template
from rlhf.models.tokens import stops_of
from rlhf.settings import ModelSettings
from tests.helpers.chat_models import KINDS, chat_tokenizer, save_chat_tokenizer

TALK = [
    {"role": "user", "content": "Name a tea."},
    {"role": "assistant", "content": "Sencha."},
    {"role": "user", "content": "Another? "},
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def template(kind: str, tmp_path: Path) -> ChatTemplate:
    return ChatTemplate(str(save_chat_tokenizer(kind, tmp_path)))


@pytest.fixture
def tokenizer(kind: str, template: ChatTemplate) -> PreTrainedTokenizerFast:
    return keep_template(AutoTokenizer.from_pretrained(template.name_or_path), SimpleNamespace(template=template))


def test_prompts_and_answers_have_transformers_ids(
    kind: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast
) -> None:
    original = chat_tokenizer(kind)
    for messages in (TALK[:1], TALK):
        ids = original.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encode(tokenizer, [template.render_messages(messages)]) == [ids]
        if original.bos_token:
            assert ids.count(original.bos_token_id) == (kind != "words")  # whose template writes none
            assert original("a")["input_ids"][0] == original.bos_token_id  # the tokenizer would write one as well
    whole = original.apply_chat_template(TALK[:2])["input_ids"]
    ((prompt, answer),) = encode_pairs(tokenizer, [template.render("Name a tea.")], ["Sencha."], 500)
    assert whole[: len(prompt + answer)] == prompt + answer
    assert answer[-1] == tokenizer.eos_token_id == original.convert_tokens_to_ids(template.end)
    assert original.decode(whole[len(prompt + answer) :]).strip() == ""


def test_contents_that_name_special_tokens_or_copy_the_template_are_text(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, forged = template.render("x"), template.render_messages(TALK)
    special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(template.special.findall(forged))}
    (answer,) = encode_answers(tokenizer, [forged])
    own = [i for i in encode_answers(tokenizer, ["x"])[0] if i in special]
    assert [i for i in answer if i in special] == own
    assert forged.strip() in tokenizer.decode(answer)
    for text in (forged, template.end, f"{template.end}\n"):
        ids = encode(tokenizer, [template.render(text)])[0]
        assert [i for i in ids if i in special] == [i for i in encode(tokenizer, [plain])[0] if i in special]
        assert text.strip() in tokenizer.decode(ids)


def test_sampled_answers_have_no_more_around_them_than_was_sampled(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast
) -> None:
    (_, ended), (_, cut) = encode_pairs(tokenizer, [template.render("a")] * 2, ["b", "b"], 500, [True, False])
    assert ended == [*cut, tokenizer.eos_token_id]
    assert tokenizer.decode(cut) == "b"


# -- every end ---------------------------------------------------------------------------------------------------------


def _model(folder: Path, eos: int | list[int]) -> ModelSettings:
    LlamaConfig(eos_token_id=2).save_pretrained(folder)
    GenerationConfig(eos_token_id=eos).save_pretrained(folder)
    return ModelSettings(name="m", name_or_path=str(folder), max_prompt_tokens=9)


@pytest.mark.parametrize("kind", ["headers", "model"])
def test_the_end_of_a_turn_is_learnt_and_sampled_and_the_other_ends_still_count(kind: str, tmp_path: Path) -> None:
    ends = {"headers": ["<|eot_id|>", "<|end_of_text|>"], "model": ["<end_of_turn>", "<eos>"]}[kind]
    template = ChatTemplate(str(save_chat_tokenizer(kind, tmp_path)))
    plain = AutoTokenizer.from_pretrained(tmp_path)
    turn, text = plain.convert_tokens_to_ids(ends)
    other = plain.bos_token_id
    settings = _model(tmp_path, [other, turn])
    tokenizer = load_tokenizer(settings, SimpleNamespace(template=template))  # type: ignore[arg-type]
    assert tokenizer.eos_token_id == turn
    assert stops_of(tokenizer, None, GenerationConfig.from_pretrained(tmp_path)) == (turn, text, other)
    assert tokenizer.pad_token_id not in (turn, text)
    # what is saved says the same, and without the template the tokenizer's own EOS stays the first
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.eos_token_id == turn
    assert saved.get_chat_template() == template.text
    assert load_tokenizer(settings).eos_token_id == text


def test_a_template_from_elsewhere_is_saved_with_the_model(tmp_path: Path) -> None:
    base = chat_tokenizer("chatml")
    base.chat_template = None
    base.save_pretrained(tmp_path)
    other = save_chat_tokenizer("chatml", tmp_path / "chat")
    template = ChatTemplate(str(tmp_path), chat_template=str(other))
    tokenizer = load_tokenizer(_model(tmp_path, 2), SimpleNamespace(template=template))  # type: ignore[arg-type]
    tokenizer.save_pretrained(tmp_path / "saved")
    asked = [{"role": "user", "content": "a"}]
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == template.render("a")
