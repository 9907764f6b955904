"""Damaged or unsuitable models, tokenizers and adapters: each is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf.errors import DataError, ModelError
from rlhf.models.export import load_adapter, save_model, saved_head
from rlhf.models.linear_layers import linear_names
from rlhf.models.loading import load_causal_lm, load_tokenizer, skeleton
from rlhf.models.tokenizing import encode_pairs, short_enough
from rlhf.settings import ModelSettings
from tests.helpers.data_readers import (
    assert_one_sentence,
)
from tests.helpers.tiny_models import tiny_model, tiny_roles, word_tokenizer


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def halved(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_weight_gone(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weights_of_another(folder: Path) -> None:
    save_model(tiny_model("neox"), word_tokenizer(), folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder)


NO_LM, NO_TOKENIZER = "no causal language model could be loaded", "no tokenizer could be loaded"


OTHER = "the weights do not fit this causal language model"


CONFIG, TOKENIZER = "config", "tokenizer_config"


MODELS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no configuration", without("config.json"), NO_LM),
    ("a configuration that is no JSON", written("config.json", b"{"), NO_TOKENIZER),
    ("a list for a configuration", written("config.json", b"[]"), NO_TOKENIZER),
    ("an unknown architecture", edited(CONFIG, model_type="nope"), "nope"),
    ("an encoder and decoder", written("config.json", b'{"model_type": "t5"}'), NO_LM),
    ("no weights", without("model.safetensors"), "no file named model.safetensors"),
    ("half of the weights", halved, f"{NO_LM} .*not fully covered"),
    ("an empty file of weights", written("model.safetensors", b""), f"{NO_LM} .*header"),
    ("a weight missing", one_weight_gone, f"{OTHER}: 1 are missing"),
    ("weights of another model", weights_of_another, OTHER),
    ("a wider model", edited(CONFIG, hidden_size=64), OTHER),
    ("a deeper model", edited(CONFIG, num_hidden_layers=3), f"{OTHER}: 9 are missing"),
    ("no head", edited(CONFIG, num_attention_heads=0), NO_TOKENIZER),
    ("a dtype that there is not", edited(CONFIG, dtype="float12"), "float12"),
    ("quantised with a program that is not here", edited(CONFIG, quantization_config={"quant_method": "gptq"}), NO_LM),
    ("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    ("a tokenizer that is no JSON", written("tokenizer.json", b"{"), NO_TOKENIZER),
    ("an empty tokenizer", written("tokenizer.json", b"{}"), NO_TOKENIZER),
    ("a tokenizer in Latin-1", written("tokenizer.json", b'"\xe9"'), NO_TOKENIZER),
    ("a list for a tokenizer's configuration", written("tokenizer_config.json", b"[]"), NO_TOKENIZER),
    ("no EOS", edited(TOKENIZER, eos_token=None), "has no EOS token"),
    ("an EOS beyond the vocabulary", edited(TOKENIZER, eos_token="<new>"), "50 embeddings, fewer than .* 51 tokens"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(), word_tokenizer(), folder)
    return folder


@pytest.mark.parametrize(("spoil", "expected"), [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_a_bad_model_is_one_sentence(tmp_path: Path, model: Path, spoil: Callable, expected: str) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(model, folder)
    spoil(folder)
    settings = ModelSettings("x", str(folder), max_prompt_tokens=8)
    with pytest.raises(ModelError) as failure:
        load_causal_lm(settings, load_tokenizer(settings))
    assert_one_sentence(failure.value, expected)
    assert str(folder) in str(failure.value)


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_tokenizer_without_a_pad_token_of_its_own_gets_one_that_exists(
    tmp_path: Path, model: Path, pad: str | None
) -> None:
    shutil.copytree(model, tmp_path / "model")
    edited(TOKENIZER, pad_token=pad)(tmp_path / "model")
    settings = ModelSettings("x", str(tmp_path / "model"), max_prompt_tokens=8)
    tokenizer = load_tokenizer(settings)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer) == load_causal_lm(settings, tokenizer).config.vocab_size


def test_texts_that_are_cut_and_prompts_that_are_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer()
    encode_pairs(tokenizer, ["w3", "w4 w5 w6"], ["w7", "w8 w9"], 3)
    assert short_enough(tokenizer, ["w3", "w3 w4", "w3 w4 w5"], 2) == [0, 1]
    assert caplog.messages == [
        "1 of 2 texts are longer than max_length=3 tokens and cut",
        "1 of 3 prompts are longer than model.max_prompt_tokens=2 and left out",
    ]
    with pytest.raises(DataError) as failure:
        short_enough(tokenizer, ["w3"], 0)
    assert_one_sentence(failure.value, "no prompt has at most model.max_prompt_tokens=0 tokens")


def test_a_model_not_yet_downloaded_is_accepted_and_a_mistake_is_found_early(tmp_path: Path, model: Path) -> None:
    assert skeleton(ModelSettings("x", "owner/not-here", max_prompt_tokens=8)) is None
    assert "q_proj" in linear_names(skeleton(ModelSettings("x", str(model), max_prompt_tokens=8)))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError) as failure:
        skeleton(ModelSettings("x", str(tmp_path), max_prompt_tokens=8))
    assert_one_sentence(failure.value, "the model type t5 has an encoder beside its decoder; allowed: ")


def test_an_adapter_of_another_model_or_a_damaged_one_is_one_sentence(tmp_path: Path, folders: Any) -> None:
    for kind, change in (("deeper", {"layers": 3}), ("another", {"kind": "neox"})):
        with pytest.raises(ModelError) as failure:
            load_adapter(tiny_roles(**change), "base", "new", folders.reward)
        assert_one_sentence(failure.value, "made for another model|no adapter could be loaded"), kind
    shutil.copytree(folders.reward, tmp_path / "reward")
    (tmp_path / "reward" / "adapter_model.safetensors").write_bytes(b"\0" * 99)
    for load in (lambda f: load_adapter(tiny_roles(), "base", "new", f), saved_head):
        with pytest.raises(ModelError) as failure:
            load(tmp_path / "reward")
        assert_one_sentence(failure.value, "cannot be read: delete .*built again")
