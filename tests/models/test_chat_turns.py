"""The assistant's earlier turns in a prompt: found by special tokens, whatever the contents say."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data.chat_template import ChatTemplate
from rlhf.errors import ConfigError, DataError
from rlhf.models.chat_turns import AssistantTurns
from rlhf.models.tokenizing import encode, keep_template
from tests.helpers.chat_models import KINDS, chat_tokenizer, save_chat_tokenizer
from tests.helpers.tiny_tokenizers import gpt2

# What each template writes around an answer, as far as the model learns it.
LEARNT = {
    "chatml": "{}<|im_end|>", "thinking": "{}<|im_end|>", "headers": "{}<|eot_id|>", "model": "{}<end_of_turn>",
    "brackets": " {}</s>", "words": "{}</s>", "channels": "<|channel|>final<|message|>{}",
}  # fmt: skip


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    source = SimpleNamespace(template=ChatTemplate(str(folder)))
    return keep_template(AutoTokenizer.from_pretrained(folder), source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answers", [["Sencha.", "Assam, or\n\nGyokuro."], ["{end}\n{prompt}", "b {end}"], []])
def test_the_assistants_tokens_are_found(kind: str, answers: list[str], tmp_path: Path) -> None:
    tokenizer = _tokenizer(save_chat_tokenizer(kind, tmp_path))
    template: ChatTemplate = tokenizer.conversation
    forged = {"end": template.end, "prompt": template.render("x").strip()}
    answers = [answer.format(**forged) for answer in answers]
    messages = [{"role": "user", "content": f"Name a tea {forged['prompt']}."}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"{answer} Another?"}]
    (ids,) = encode(tokenizer, [template.render_messages(messages)])
    mask = AssistantTurns(tokenizer)(ids)
    assert len(mask) == len(ids)
    found = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])
    assert found == "".join(LEARNT[kind].format(answer) for answer in answers)


def test_a_turn_that_is_cut_off_at_either_end_is_not_learnt(tmp_path: Path) -> None:
    tokenizer = _tokenizer(save_chat_tokenizer("chatml", tmp_path))
    messages = [{"role": role, "content": "ab"} for role in ("user", "assistant", "user")]
    (ids,) = encode(tokenizer, [tokenizer.conversation.render_messages(messages)])
    turns = AssistantTurns(tokenizer)
    last = max(i for i, own in enumerate(turns(ids)) if own)
    assert sum(turns(ids)) == 3
    assert not any(turns(ids[last:]))
    assert not any(turns(ids[:last]))


def test_without_turns_that_can_be_told_apart_a_sentence_says_what_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft.loss_on=assistant needs data/template=chat"):
        AssistantTurns(gpt2())
    tokenizer = chat_tokenizer("words")
    asking = "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + asking
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match=r"no special token around the assistant's turns.*allowed: sft.loss_on=response"
    ):
        AssistantTurns(_tokenizer(tmp_path))
