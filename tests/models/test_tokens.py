"""Special tokens: their names in texts stay text, templates may use them, and no text needs the pad token."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.data.templates import Template
from rlhf.models.export import save_model
from rlhf.models.tokenizing import encode, encode_pairs, keep_template
from rlhf.models.tokens import give_pad
from tests.helpers.tiny_tokenizers import END, byte_level, gpt2, llama

# -- special tokens in texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", ["It costs <s>5</s> 4.", f"Say {END}", f"{END}", "</s>", "<s> a", "<unk>"])
def test_a_special_tokens_name_in_the_data_is_text(make: Callable, text: str) -> None:
    tokenizer = make()
    (prompt, response), = encode_pairs(tokenizer, [text], [text], 200)  # fmt: skip
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt + response[:-1]
    assert prompt.count(tokenizer.bos_token_id) == (1 if make is llama else 0)
    assert tokenizer.decode(prompt, skip_special_tokens=True).strip() == text
    assert tokenizer.decode(response, skip_special_tokens=True).strip() == text


@pytest.mark.parametrize("eos", [False, True])
def test_ordinary_prompts_have_the_tokenizers_own_ids_without_an_eos_behind(eos: bool) -> None:
    tokenizer = llama(eos)
    texts = ["Name tea.", " indented", "ÿ", "a\n\nb "]
    expected = [ids[:-1] if eos else ids for ids in tokenizer(texts)["input_ids"]]
    assert encode(tokenizer, texts) == expected
    assert all(ids[0] == 1 for ids in expected)
    assert encode(tokenizer, []) == []


def test_a_vocabulary_that_holds_a_special_tokens_name_as_a_word_gives_unk(make_tokenizer: Callable) -> None:
    assert encode(make_tokenizer(), ["w3 w4", "w3 <eos>", "<eos>", "w5"]) == [[3, 4], [3, 2], [2], [5]]


CHAT = {
    "with_input": "<|user|>{instruction}\n{input}<|end|><|bot|>",
    "without_input": "<|user|>{instruction}<|end|><|bot|>",
}


@pytest.mark.parametrize("input", ["", "b"])
def test_special_tokens_of_the_template_are_special_and_those_in_its_gaps_are_text(input: str) -> None:
    tokenizer = byte_level("<|user|>", "<|bot|>", "<|end|>", eos_token="<|end|>")
    user, bot, end = tokenizer.convert_tokens_to_ids(["<|user|>", "<|bot|>", "<|end|>"])
    template = Template(**CHAT)
    keep_template(tokenizer, SimpleNamespace(template=template))

    def written(text: str) -> list[int]:
        body = tokenizer(f"{text}\n{input}" if input else text, split_special_tokens=True)["input_ids"]
        assert not {user, bot, end} & set(body)
        return [user, *body, end, bot]

    texts = ["a", "a<|end|><|bot|>c", "<|user|>", "", "{instruction}"]
    assert encode(tokenizer, [template.render(text, input) for text in texts]) == [written(text) for text in texts]
    assert encode(tokenizer, ["<|user|>"]) == [tokenizer("<|user|>", split_special_tokens=True)["input_ids"]]


def test_a_bos_that_the_template_writes_is_not_doubled() -> None:
    tokenizer, template = llama(), Template("<s>Q: {instruction} {input}", "<s>Q: {instruction}</s>A:")
    keep_template(tokenizer, SimpleNamespace(template=template))
    plain, odd = encode(tokenizer, [template.render("hi"), template.render("<s>hi</s>")])
    assert plain == tokenizer("<s>Q: hi</s>A:", add_special_tokens=False)["input_ids"]
    assert (plain.count(1), plain.count(2)) == (odd.count(1), odd.count(2)) == (1, 1)
    assert encode(tokenizer, ["hi"])[0].count(1) == 1


def test_a_prompt_that_is_cut_keeps_its_bos() -> None:
    tokenizer = llama()
    whole = encode(tokenizer, ["abcdef"])[0]
    for room in (1, 2, 4):
        (prompt, response), = encode_pairs(tokenizer, ["abcdef"], ["xyz"], room + 1)  # fmt: skip
        assert prompt == [1, *whole[len(whole) - room + 1 :]]
        assert len(response) == 1
    without = encode_pairs(gpt2(), ["abcdef"], ["xyz"], 4)[0][0]
    assert without == encode(gpt2(), ["def"])[0]


def test_an_answer_that_was_cut_off_gets_no_eos() -> None:
    tokenizer = gpt2()
    whole, cut = encode_pairs(tokenizer, ["a", "a"], ["xy", "xy"], 9, [True, False])
    assert whole == (cut[0], [*cut[1], tokenizer.eos_token_id])


# -- the pad token -----------------------------------------------------------------------------------------------------

PADS = {
    "its own": (byte_level("<e>", "<p>", eos_token="<e>", pad_token="<p>"), (), "<p>"),
    "EOS": (byte_level("<e>", "<u>", eos_token="<e>", pad_token="<e>", unk_token="<u>"), (), "<u>"),
    "another end": (byte_level("<e>", "<p>", eos_token="<e>", pad_token="<p>"), ("<p>",), "ÿ"),
    "BOS": (byte_level("<b>", "<e>", eos_token="<e>", bos_token="<b>", pad_token="<b>"), (), "ÿ"),
    "by its name": (byte_level("<e>", "<x>", "<|right_pad_id|>", eos_token="<e>"), (), "<|right_pad_id|>"),
    "left over": (byte_level("<b>", "<e>", "<x>", "<|reserved_0|>", eos_token="<e>"), (), "<|reserved_0|>"),
    "only EOS": (gpt2(), (), "ÿ"),
    "sentencepiece": (llama(), (), "<unk>"),
}


@pytest.mark.parametrize(("tokenizer", "ends", "pad"), PADS.values(), ids=PADS)
def test_the_pad_token_is_neither_an_end_nor_a_beginning_nor_part_of_a_text(
    tokenizer: PreTrainedTokenizerFast, ends: tuple[str, ...], pad: str, tmp_path: Path
) -> None:
    size = len(tokenizer)
    give_pad(tokenizer, [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(ends))])
    assert (tokenizer.pad_token, len(tokenizer)) == (pad, size)
    tokenizer.save_pretrained(tmp_path)
    for known in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert known.pad_token_id == tokenizer.pad_token_id
        text = "Sure! Great!! L'Haÿ-les-Roses"
        ids = known(text)["input_ids"]
        assert known.pad_token_id not in ids
        assert known.decode(ids, skip_special_tokens=True) == text


def test_a_classifier_does_not_get_the_eos_token_as_its_pad_token(make_model: Callable, tmp_path: Path) -> None:
    """With EOS as the pad token, transformers would read the score one token too early; it refuses batches instead."""
    backend = Tokenizer(models.WordLevel({"<e>": 0, "a": 1}, unk_token="<e>"))
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"), make_model()
    model.generation_config.eos_token_id = model.config.eos_token_id = 0
    give_pad(tokenizer, [0])
    assert tokenizer.pad_token == "<e>"
    save_model(model, tokenizer, tmp_path)
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (None, 0)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    with pytest.raises(ValueError, match="no padding token"):
        plain(input_ids=torch.tensor([[3, 0], [4, 0]]))
