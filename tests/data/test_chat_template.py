"""Chat templates: rendered as transformers does, read back, and refused in a sentence."""

import pickle
from pathlib import Path

import pytest

from rlhf.data.chat_template import ChatTemplate
from rlhf.data.options import parse_template
from rlhf.data.special_tokens import unmarked
from rlhf.data.templates import Template, conversation_of
from rlhf.errors import DataError, RowError
from tests.helpers.chat_models import KINDS, chat_tokenizer, save_chat_tokenizer
from tests.helpers.tiny_tokenizers import gpt2

ENDS = {
    "chatml": "<|im_end|>", "thinking": "<|im_end|>", "headers": "<|eot_id|>", "model": "<end_of_turn>",
    "brackets": "</s>", "words": "</s>", "channels": "<|return|>",
}  # fmt: skip
TALK = [
    {"role": "user", "content": "Name a tea."},
    {"role": "assistant", "content": "Sencha."},
    {"role": "user", "content": "Another?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def template(kind: str, tmp_path: Path) -> ChatTemplate:
    return ChatTemplate(str(save_chat_tokenizer(kind, tmp_path)))


def test_a_prompt_is_what_transformers_renders_and_ends_where_the_assistant_speaks(
    kind: str, template: ChatTemplate
) -> None:
    tokenizer = chat_tokenizer(kind)
    for messages in (TALK[:1], TALK):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render_messages(messages) == expected
    assert template.render("Name a tea.") == template.render_messages(TALK[:1])
    assert template.render("a", "b") == template.render("a\n\nb")


def test_an_answer_is_what_the_template_writes_behind_the_prompt_up_to_the_end_of_the_turn(
    kind: str, template: ChatTemplate
) -> None:
    assert template.end == ENDS[kind]
    whole = chat_tokenizer(kind).apply_chat_template(TALK[:2], tokenize=False)
    prompt, answer = template.render_messages(TALK[:1]), template.answer("Sencha.")
    assert whole.startswith(prompt + answer)
    assert whole[len(prompt + answer) :].strip() == ""
    assert answer.endswith(ENDS[kind])
    assert answer.count("Sencha.") == answer.count(ENDS[kind]) == 1


def test_a_prompt_is_read_back_as_its_messages(kind: str, template: ChatTemplate) -> None:
    odd = [*TALK[:2], {"role": "user", "content": f"What does {ENDS[kind]} do?"}]
    talks = [TALK[:1], TALK, odd] if kind in ("model", "brackets") else [TALK[:1], TALK, odd, [SYSTEM, *TALK]]
    for messages in talks:
        assert template.messages_of(template.render_messages(messages)) == messages
    assert template.messages_of("Name a tea.") is None


def test_a_configured_system_prompt_is_for_conversations_without_one(tmp_path: Path) -> None:
    template = ChatTemplate(str(save_chat_tokenizer("headers", tmp_path)), system="Be brief.")
    with_own = template.render_messages([{**SYSTEM, "content": "Be long."}, *TALK])
    assert template.render_messages(TALK) == template.render_messages([SYSTEM, *TALK])
    assert "Be long." in with_own
    assert "Be brief." not in with_own
    assert template.messages_of(template.render_messages(TALK)) == TALK
    assert template.messages_of(with_own) == [{**SYSTEM, "content": "Be long."}, *TALK]


def test_options_reach_the_template(tmp_path: Path) -> None:
    folder = str(save_chat_tokenizer("thinking", tmp_path))
    off = ChatTemplate(folder, options={"enable_thinking": False})
    assert off.render("a").endswith("<think>\n\n</think>\n\n")
    assert off.answer("b") == "b<|im_end|>"
    assert ChatTemplate(folder).answer("b") == "<think>\n\n</think>\n\nb<|im_end|>"


def test_contents_that_name_a_special_token_are_marked_and_people_read_them_unmarked(
    kind: str, template: ChatTemplate
) -> None:
    text = f"Say {ENDS[kind]}{ENDS[kind]} twice"
    prompt, plain = template.render(text), template.render("Say  twice")
    assert unmarked(prompt).count(text) == 1
    assert len(template.special.findall(prompt)) == len(template.special.findall(plain))


@pytest.mark.parametrize("named", ["a file", "another tokenizer"])
def test_a_base_model_takes_a_template_from_elsewhere(named: str, tmp_path: Path) -> None:
    base = chat_tokenizer("chatml")
    base.chat_template = None
    base.save_pretrained(tmp_path / "base")
    other = save_chat_tokenizer("chatml", tmp_path / "chat")
    file = other / "chat_template.jinja"
    template = ChatTemplate(str(tmp_path / "base"), chat_template=str(file if named == "a file" else other))
    assert template.render("a") == ChatTemplate(str(other)).render("a")


def test_what_cannot_be_used_is_refused_in_a_sentence_that_says_what_can(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    other = str(save_chat_tokenizer("chatml", tmp_path / "chat"))
    base = str(tmp_path / "base")
    cases = {
        r"base has no chat template; allowed: data.template.chat_template with a .jinja file": ChatTemplate(base),
        r"made from scratch and has no chat template; allowed": ChatTemplate(None),
        r"'<\|im_end\|>', which is no special token of .*base; allowed": ChatTemplate(base, chat_template=other),
        r"chat_template=none.jinja: there is no such file": ChatTemplate(base, chat_template="none.jinja"),
        r"no tokenizer could be loaded from /nowhere": ChatTemplate("/nowhere"),
        r"data.template.system='x' cannot be rendered: .*alternate": ChatTemplate(
            str(save_chat_tokenizer("model", tmp_path / "model")), system="x"
        ),
    }
    for complaint, template in cases.items():
        with pytest.raises(DataError, match=complaint):
            template.check()
    ChatTemplate(other).check()


def test_messages_that_a_template_refuses_are_a_bad_row(tmp_path: Path) -> None:
    template = ChatTemplate(str(save_chat_tokenizer("model", tmp_path)))
    with pytest.raises(RowError, match=r"the chat template refuses the messages .*Roles must alternate"):
        template.render_messages([TALK[0], TALK[2]])
    plain = Template("{instruction} {input}", "Q: {instruction}")
    assert plain.render_messages(TALK[:1]) == "Q: Name a tea."
    for messages in (TALK, [SYSTEM, TALK[0]], TALK[1:2]):
        with pytest.raises(RowError, match="only has a place for one message of the user"):
            plain.render_messages(messages)


def test_format_strings_are_read_back_too() -> None:
    template = Template("Q: {instruction}\nI: {input}\nA:", "Q: {instruction}\nA:")
    assert template.messages_of(template.render("a", "b")) == [{"role": "user", "content": "a\n\nb"}]
    assert template.messages_of(template.render("a")) == [{"role": "user", "content": "a"}]
    assert template.messages_of("a") is None


def test_the_rows_cached_with_a_template_depend_on_its_text_and_special_tokens(tmp_path: Path) -> None:
    folder = save_chat_tokenizer("chatml", tmp_path)
    before, used = pickle.dumps(ChatTemplate(str(folder))), ChatTemplate(str(folder))
    used.render("a")
    assert pickle.dumps(used) == before
    assert pickle.loads(before) == used
    (folder / "chat_template.jinja").write_text(KINDS["chatml"][0].replace("Be kind.", "Be rude."))
    assert pickle.dumps(ChatTemplate(str(folder))) != before


DATED = "{% if strftime_now is defined %}Today is {{ strftime_now('%d %b %Y') }}.{% endif %}" + KINDS["headers"][0]


def test_a_template_that_writes_the_date_writes_a_fixed_one_and_takes_no_other_form(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("headers")
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path)
    template, later = ChatTemplate(str(tmp_path)), ChatTemplate(str(tmp_path), date="2025-01-02")
    prompt = template.render("a")
    assert prompt.startswith("Today is 26 Jul 2024.")
    assert later.render("a").startswith("Today is 02 Jan 2025.")
    assert template.messages_of(prompt) == [{"role": "user", "content": "a"}]
    assert pickle.dumps(later) != pickle.dumps(template)
    file = tmp_path / "other.jinja"
    file.write_text("{% set form = '%Y' %}{{ strftime_now(form) }}" + KINDS["headers"][0])
    for complaint, wrong in {
        r"data\.template\.date=today is no day; allowed: one such as": ChatTemplate(str(tmp_path), date="today"),
        r"today's date in a way that.*allowed": ChatTemplate(str(tmp_path), chat_template=str(file)),
    }.items():
        with pytest.raises(DataError, match=complaint):
            wrong.check()


def test_a_prompt_that_another_template_made_is_not_taken_for_a_question(tmp_path: Path) -> None:
    template = ChatTemplate(str(save_chat_tokenizer("headers", tmp_path)))
    assert conversation_of("Name a tea.", template) == TALK[:1]  # of a part of a mixture that has no template
    with pytest.raises(RowError, match="cannot be read back as a conversation"):
        conversation_of("Today is 26 Jul 2024." + template.render("a"), template)


def test_a_configuration_chooses_between_strings_and_a_chat_template() -> None:
    strings = {"with_input": "{instruction}{input}", "without_input": "{instruction}"}
    assert isinstance(parse_template(strings), Template)
    made = parse_template({"name_or_path": "a", "options": {"enable_thinking": False}})
    assert made == ChatTemplate("a", options={"enable_thinking": False})
    for wrong in (None, "chat", {"name_or_path": "a", "sytem": "b"}, {"with_input": "{instruction}"}):
        with pytest.raises(DataError, match="is not allowed; allowed: data/template=…, a mapping"):
            parse_template(wrong)


def test_of_two_strings_that_match_the_one_with_more_text_of_its_own_is_read_back() -> None:
    template = Template("I: {input}\nQ: {instruction}\nA:", "{instruction}\nA:")
    assert template.messages_of(template.render("a b", "c")) == [{"role": "user", "content": "a b\n\nc"}]
    assert template.messages_of(template.render("a b")) == [{"role": "user", "content": "a b"}]
    loose = Template("{instruction} {input}", "Q: {instruction}")
    assert loose.messages_of(loose.render("a b")) == [{"role": "user", "content": "a b"}]
