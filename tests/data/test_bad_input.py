"""A hundred and more bad inputs: each is refused in one sentence, or its bad rows are skipped and counted."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf.errors import DataError, ModelError
from rlhf.models.export import load_adapter, save_model, saved_head
from rlhf.models.loading import linear_names, load_causal_lm, load_tokenizer, skeleton
from rlhf.models.tokenizing import encode_pairs
from rlhf.pipeline.run import Run
from rlhf.settings import ModelSettings, Settings
from tests.helpers.composed_config import compose_and_check
from tests.helpers.data_readers import (
    CHAT,
    FILES,
    GOOD,
    PAIR,
    SPLIT,
    alpaca,
    assert_one_sentence,
    dump,
    imdb,
    lines,
    pairs,
    preference,
    readable_id,
    usable_rows,
)
from tests.helpers.tiny_models import tiny_model, tiny_roles, word_tokenizer

# a good row and a bad one: which reader, the bad row, why it is skipped
ROWS: list[tuple[Callable, Any, str]] = [
    (alpaca, "text", "not a JSON object"),
    (alpaca, 7, "not a JSON object"),
    (alpaca, None, "not a JSON object"),
    (alpaca, [GOOD], "not a JSON object"),
    (alpaca, {}, "no `instruction`"),
    (alpaca, {"Instruction": "Do", "output": "x"}, "no `instruction`"),
    (alpaca, {"instruction": "Do"}, "no `output`"),
    (alpaca, {"instruction": "", "output": "x"}, "empty `instruction`"),
    (alpaca, {"instruction": "Do", "output": " \n\u00a0"}, "empty `output`"),
    (alpaca, {"instruction": CHAT, "output": "x"}, "`instruction` is of type list, not text"),
    (alpaca, {"instruction": "Do", "output": CHAT}, "`output` is of type list, not text"),
    (alpaca, {"instruction": "Do", "input": {"a": 1}, "output": "x"}, "`input` is of type dict, not text"),
    (alpaca, {"instruction": "Do", "output": float("nan")}, "`output` is of type float, not text"),
    (alpaca, {"instruction": "Do", "output": True}, "`output` is of type bool, not text"),
    (alpaca, {"instruction": "Do", "output": "x" * 1_000_001}, "`output` is longer than 1,000,000 characters"),
    (alpaca, {"instruction": "Do", "output": "\ud800"}, "`output` holds half a character (a lone surrogate)"),
    (alpaca, GOOD, "duplicate of an earlier row"),
    (preference, {**GOOD, "output_2": "one "}, "`output_1` and `output_2` are identical"),
    (preference, {**GOOD, "preference": 0}, "`preference` is a tie"),
    (preference, {**GOOD, "preference": None}, "`preference` is not between 1 and 2"),
    (preference, {**GOOD, "preference": "left"}, "`preference` is not between 1 and 2"),
    (preference, {**GOOD, "preference": [1]}, "`preference` is not between 1 and 2"),
    (preference, {**GOOD, "output_1": CHAT}, "`output_1` is of type list, not text"),
    (imdb, {"text": "Good.", "label": 1}, "`text` is shorter than two words"),
    (imdb, {"text": "Good film.", "label": 3}, "`label` is neither 0 nor 1"),
    (imdb, {"text": "Good film.", "label": {"a": 1}}, "`label` is neither 0 nor 1"),
    (imdb, {"review": "Good film."}, "no `text`"),
    (pairs, {**PAIR, "response_k": " So."}, "`response_j` and `response_k` are identical"),
    (pairs, {**PAIR, "question": None}, "no `question`"),
    (pairs, {**PAIR, "response_j": CHAT}, "`response_j` is of type list, not text"),
]


@pytest.mark.parametrize(("reader", "bad", "reason"), ROWS, ids=readable_id)
def test_a_bad_row_is_skipped_and_counted(tmp_path: Path, reader: Callable, bad: Any, reason: str) -> None:
    good = PAIR if reader is pairs else GOOD
    (tmp_path / "rows.jsonl").write_bytes(lines(good, bad))
    source, split = reader(tmp_path, "rows.jsonl"), SPLIT[reader]
    assert usable_rows(source, split) == 1
    assert source.report[split].counts == {reason: 1}


@pytest.mark.parametrize(("reader", "name", "content", "expected"), FILES, ids=readable_id)
def test_a_bad_file_is_one_sentence_or_counted(
    tmp_path: Path, reader: Callable, name: str, content: bytes, expected: str | tuple[int, int]
) -> None:
    (tmp_path / name).write_bytes(content)
    source, split = reader(tmp_path, name), SPLIT[reader]
    if isinstance(expected, tuple):
        assert (usable_rows(source, split), sum(source.report[split].counts.values())) == expected
        return
    with pytest.raises(DataError) as failure:
        usable_rows(source, split)
    assert_one_sentence(failure.value, expected)


PATHS = ["missing.jsonl", "folder.jsonl", "./missing", "x" * 300 + ".jsonl", "a\0b.jsonl", "~nobody/x.jsonl"]


@pytest.mark.parametrize("reader", [alpaca, dump], ids=["alpaca", "dump"])
@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name[:20]))
def test_a_path_that_is_no_file_is_refused_before_anything_is_read(tmp_path: Path, reader: Callable, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.xml").mkdir()
    if reader is dump:
        name = name.replace("jsonl", "xml")
    with pytest.raises(DataError) as failure:
        reader(tmp_path, name).check()
    assert_one_sentence(failure.value, "does not exist|is not a file")


# overrides of the default configuration, and the sentence
CONFIGURED: list[tuple[str, str]] = [
    ("judge=null", "a config group was given no option but NoneType; allowed: group=option"),
    ("~judge", "judge=None has no _target_; allowed: finished_reward_model, gold, "),
    ("~scorer", "scorer=None has no _target_; allowed: bag_of_words, function, gold"),
    ("stage.name=dpo", "stage.name=dpo is not allowed; allowed: evaluate, ppo, preferences, reward, sft"),
    ("scorer._target_=os.getcwd", "scorer._target_=os.getcwd is no scorer"),
    ("judge._target_=nope", "judge._target_=nope cannot be imported"),
    ("data._target_=builtins.dict", "data._target_=builtins.dict is no data set"),
    ("data._target_=nope.Data", "data: .*nope"),
    ("data.people=-1", "data"),
    ("+data.nope=1", "data: .*nope"),
    ("data=alpaca judge=none data.on_bad_row=ignore", "on_bad_row is `skip` or `fail`"),
    ("data=alpaca judge=none data.max_rows=-1", "max_rows is a positive number"),
    ("data=alpaca judge=none data.sft='x.jsonl[5:2]'", "malformed slice"),
    ("data=alpaca judge=none data.template.without_input=x", "template.without_input must use exactly"),
    ("data=imdb judge=none scorer=sentiment data.shares.sft=2", "shares maps some of"),
    ("data=stack_exchange judge=none data.root=/nope", "/nope/Posts.xml does not exist"),
    ("data.sft=x.jsonl[:5]", r"must be quoted; allowed: 'data.sft=\"x.jsonl\[:5\]\"', with both kinds"),
    ("data.sft=[a.jsonl[:5],b.jsonl]", r"allowed: 'data.sft=\[\"…\",\"…\"\]'"),
    ("data.sft=a.jsonl[:5],b.jsonl", r"allowed: 'data.sft=\"a.jsonl\[:5\]\",\"b.jsonl\"'"),
    ("data.sft={a:1", "data.sft={a:1: the command line cannot be read here"),
    ("divergence.function=os.nope", "divergence.function=os.nope cannot be imported"),
    ("divergence.input=words", "divergence.input=words is not allowed; allowed: logprobs, logits or none"),
    ("kl.coef=inf", "kl"),
    ("kl.coef=much", "kl"),
    ("seed=-1", "seed=-1 is not allowed; allowed: a whole number from 0"),
    ("sft.seed=4294967296", "sft.seed=4294967296 is not allowed"),
    ("ppo.lr=inf", "ppo.lr=inf is not allowed; allowed: a number above 0"),
    ("ppo.lr=nan", "ppo.lr=nan is not allowed"),
    ("ppo.lr=null", "ppo.lr"),
    ("ppo.steps=1.5", "ppo.steps: .*1.5"),
    ("ppo.steps=0", "ppo.steps=0 is not allowed"),
    ("ppo.schedule=cubic", "ppo.schedule=cubic is not allowed; allowed: linear, cosine or constant"),
    ("+ppo.accumulation=other", "ppo.accumulation=other is not allowed"),
    ("sft.epochs=-0.5", "sft.epochs=-0.5 is not allowed"),
    ("sft.loss_on=prompt", "sft.loss_on=prompt is not allowed; allowed: response or text"),
    ("reward.batch_size=[]", "reward.batch_size"),
    ("lora.r=-8", "lora.r=-8 is not allowed"),
    ("lora.target_modules=query", "lora.target_modules"),
    ("lora.target_modules=[c_attn]", "no linear layer named c_attn; allowed: .*q_proj"),
    ("lora.target_modules=[q_proj,lm_head]", "no linear layer named lm_head; allowed: .*q_proj"),
    ("lora@sft.lora=r8 sft.lora.target_modules=[lm_head]", "no linear layer named lm_head; allowed: .*q_proj"),
    ("lora.target_modules=[embed_tokens]", "no linear layer named embed_tokens; allowed: .*q_proj"),
    ("lora@reward.lora=r8 reward.lora.target_modules=[w1]", "lora@reward.lora.target_modules: .*w1; allowed: .*q_proj"),
    ("model.dtype=float64", "model.dtype=float64 is not allowed; allowed: float32, bfloat16 or float16"),
    ("model.config.model_type=nope", "model.config: .*nope"),
    ("model.config.num_attention_heads=0", "model.config: no causal language model can be made"),
    ("model.config.num_attention_heads=7", "model.config: .*not a multiple of the number of attention heads"),
    ("model.config.hidden_size=wide", "model.config: .*hidden_size"),
    ("+model.config.hidden_act=nope", "model.config: .*nope"),
    ("model.name_or_path=/nope", "model.name_or_path=/nope: there is no such folder"),
    ("model.name_or_path=./rlhf model.gguf_file=x.gguf", "there is no such (folder|file)"),
    ("generation.max_new_tokens=0", "generation.max_new_tokens=0 is not allowed"),
    ("generation.engine=vlm", "generation.engine=vlm is not allowed; allowed: native, transformers or vllm"),
    ("evaluation.prompts=-1", "evaluation.prompts=-1 is not allowed"),
    ("resume=maybe", "resume=maybe is not allowed; allowed: auto, must or never"),
    ("scorer=function scorer.function=os.nope", "scorer.function=os.nope cannot be imported"),
]


@pytest.mark.parametrize(("overrides", "expected"), CONFIGURED, ids=[row[0] for row in CONFIGURED])
def test_a_bad_value_is_one_sentence_before_a_model_is_made(overrides: str, expected: str) -> None:
    with pytest.raises(Exception) as failure:  # noqa: PT011  (explain says which are told to the user)
        compose_and_check(*overrides.split())
    assert_one_sentence(failure.value, expected)


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
OTHER = "the weights there are not those of this causal language model"
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
    source = SimpleNamespace(load=lambda split: {"prompt": ["w3", "w3 w4", "w3 w4 w5"]})
    run = SimpleNamespace(settings=Settings(model=ModelSettings("x", max_prompt_tokens=2)), source=source)
    assert Run._prompts(run, tokenizer) == ["w3", "w3 w4"]
    assert caplog.messages == [
        "1 of 2 texts are longer than max_length=3 tokens and cut",
        "1 of 3 prompts are longer than model.max_prompt_tokens=2 and left out",
    ]
    run.settings.model.max_prompt_tokens = 0
    with pytest.raises(DataError) as failure:
        Run._prompts(run, tokenizer)
    assert_one_sentence(failure.value, "no prompt has at most model.max_prompt_tokens=0 tokens")


def test_what_cannot_be_got_yet_is_no_mistake_and_what_is_one_is_told_early(tmp_path: Path, model: Path) -> None:
    assert skeleton(ModelSettings("x", "owner/not-here", max_prompt_tokens=8)) is None
    assert "q_proj" in linear_names(skeleton(ModelSettings("x", str(model), max_prompt_tokens=8)))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError) as failure:
        skeleton(ModelSettings("x", str(tmp_path), max_prompt_tokens=8))
    assert_one_sentence(failure.value, "no causal language model can be made of this configuration")


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


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("data=alpaca judge=reward_model data.root=FOLDER data.eval=null", "x.jsonl"),
        ("divergence=foo", "divergence=foo"),
    ],
)
@pytest.mark.slow
def test_the_command_itself_says_it_in_one_line_and_exits_with_2(tmp_path: Path, overrides: str, names: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{")
    files = (
        [f"data.{split}=x.jsonl" for split in ("sft", "preference", "preference_validation", "prompts")]
        if "FOLDER" in overrides
        else []
    )
    command = [sys.executable, "-m", "rlhf", *overrides.replace("FOLDER", str(tmp_path)).split(), *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("rlhf: ")]
    assert len(told) == 1
    assert names in told[0]
    assert not list(tmp_path.rglob("summary.json"))


def test_the_tables_are_as_long_as_they_are_said_to_be() -> None:
    assert len(ROWS) + len(FILES) + 2 * len(PATHS) + len(CONFIGURED) + len(MODELS) >= 150
