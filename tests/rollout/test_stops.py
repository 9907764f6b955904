"""Stop tokens and sampling options: in each engine, for judges, and in exported models under plain transformers."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

from rlhf.data.records import Prompt, SampledComparison
from rlhf.evaluation.judges import RewardModelJudge
from rlhf.finished.chat.models import LoadedRole
from rlhf.finished.chat.responders import sample_tokens
from rlhf.finished.judge import FinishedRewardModelJudge
from rlhf.models.export import save_adapter, save_model
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.roles import Role, Roles
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import Response
from rlhf.models.tokens import stop_ids, stops_of
from rlhf.pipeline.builders.reward import save_full_reward
from rlhf.rollout.engine import GenerationRequest
from rlhf.rollout.factory import make_engine
from rlhf.rollout.huggingface import TransformersEngine
from rlhf.rollout.native import NativeEngine
from rlhf.rollout.sample import rollout
from rlhf.scorers import Context
from rlhf.settings import GenerationSettings, ModelSettings
from rlhf.stages.reward import RewardModeling
from tests.helpers import vllm_stand_in
from tests.helpers.scorer_context import NoSource
from tests.helpers.tiny_models import EOS, PAD, UNK, tiny_lora, tiny_model, tiny_roles, word_tokenizer
from tests.helpers.tiny_tokenizers import gpt2

OTHER = 17  # a second id to stop at
PROMPTS = [[5, 9, 7], [3], [11, 4, 4, 30, 8, 22, 17], [40, 41]] * 5
FILTERS = {"top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.5, "epsilon_cutoff": 0.01, "min_new_tokens": 9,
           "suppress_tokens": [EOS], "repetition_penalty": 2.0, "temperature": 0.3, "do_sample": True}  # fmt: skip


def seeded_roles() -> Roles:
    """Roles that do not depend on earlier tests: peft draws its A matrices from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_roles()


def rows_of(engine: Any, roles: Roles, temperature: float = 1.0) -> list[list[int]]:
    request = GenerationRequest(PROMPTS, 20, temperature, torch.Generator().manual_seed(0))
    made = engine.generate(roles, "policy", request)
    return [ids[:length] for ids, length in zip(made.ids.tolist(), made.lengths.tolist(), strict=True)]


# -- stop ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (EOS, None, (EOS,)),
        (EOS, [UNK, EOS], (EOS, UNK)),  # the tokenizer's EOS comes first, because it ends the demonstrations
        (UNK, [9], (EOS, 9)),  # the config counts if there is no generation_config
        (UNK, None, (EOS, UNK)),
        (9, None, (EOS,)),  # the id of a word is more likely a default of the config class than an end
        ([9, UNK], None, (EOS, 9, UNK)),
        (None, None, (EOS,)),
    ],
)
def test_the_ids_that_end_a_response(config: Any, generation: Any, expected: tuple[int, ...]) -> None:
    said = None if generation is None else GenerationConfig(eos_token_id=generation)
    assert stops_of(word_tokenizer(), LlamaConfig(eos_token_id=config), said) == expected


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [NativeEngine, lambda ids: TransformersEngine(ids, PAD)], ids=["native", "hf"])
def test_a_response_ends_at_whichever_of_the_ids_comes_first(make: Callable) -> None:
    """Draws are the same as with one stop id, up to the second one."""
    roles = seeded_roles()
    long, short = rows_of(make(EOS), roles), rows_of(make([EOS, OTHER]), roles)
    assert short == [row[: row.index(OTHER) + 1] if OTHER in row else row for row in long]
    assert any(row[-1] == OTHER for row in short)
    assert any(row[-1] == EOS for row in short)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_rollout_has_ended_at_any_of_them(engine: str) -> None:
    roles, tokenizer = seeded_roles(), word_tokenizer()
    roles.trunk("policy").generation_config = GenerationConfig(eos_token_id=[EOS, OTHER])
    settings = GenerationSettings(engine=engine, max_new_tokens=12, batch_size=7)
    prompts = [" ".join(f"w{i}" for i in prompt) for prompt in PROMPTS]
    found = rollout(
        make_engine(settings, tokenizer, roles), roles, "policy", tokenizer, prompts, settings, torch.Generator()
    )
    ids = found.sequences.responses()
    assert [row[-1] in (EOS, OTHER) for row in ids] == found.ended.tolist()
    assert {row[-1] for row in ids} > {EOS, OTHER}
    assert not {EOS, OTHER} & {i for row in ids for i in row[:-1]}
    assert [(text.ids, text.ended) for text in found.responses] == [  # type: ignore[attr-defined]
        (tuple(row), ended) for row, ended in zip(ids, found.ended.tolist(), strict=True)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_what_the_checkpoint_recommends_does_not_change_what_is_sampled(temperature: float) -> None:
    roles, engine = seeded_roles(), TransformersEngine(EOS, PAD)
    expected = rows_of(engine, roles, temperature)
    recommended = roles.trunk("policy").generation_config = GenerationConfig(**FILTERS)
    assert rows_of(engine, roles, temperature) == expected
    assert roles.trunk("policy").generation_config is recommended


def test_chat_stops_at_any_of_them() -> None:
    roles = seeded_roles()
    for prompt, row in zip(PROMPTS, rows_of(NativeEngine([EOS, OTHER]), roles, 0.0), strict=True):
        said = sample_tokens(LoadedRole(roles, "policy"), prompt, 20, 0.0, torch.Generator(), (EOS, OTHER))
        assert list(said) == row


def test_vllm_is_asked_for_the_plain_softmax_up_to_any_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a stand-in for vLLM, which needs a GPU."""
    llm = vllm_stand_in.install(monkeypatch)
    save_model(tiny_model(), word_tokenizer(), tmp_path)
    GenerationConfig(eos_token_id=[OTHER, EOS], **FILTERS).save_pretrained(tmp_path)
    roles = Roles(AutoModelForCausalLM.from_pretrained(tmp_path))
    settings = GenerationSettings(engine="vllm", max_new_tokens=8, capture_logprobs="never")
    engine = make_engine(settings, word_tokenizer(), roles)
    made = engine.generate(roles, "reference", GenerationRequest([[5], [6]], 8, 0.7, torch.Generator()))
    assert made.lengths.tolist() == [2, 2]
    assert llm.options["generation_config"] == "vllm"
    for sampling in llm.sampling:
        assert sampling.pop("seed") >= 0
        assert sampling == {
            "temperature": 0.7, "top_p": 1.0, "top_k": 0, "max_tokens": 8, "ignore_eos": True,
            "stop_token_ids": [EOS, OTHER], "detokenize": False, "logprobs": None,
        }  # fmt: skip


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["own", "finished"])
def test_a_judge_scores_what_was_sampled(same: bool) -> None:
    """By hand: rewards are read at the last sampled token, and at the EOS of a reference, which is complete."""
    roles, tokenizer = seeded_roles(), word_tokenizer()
    kind = RewardModelJudge if same else FinishedRewardModelJudge
    judge = object.__new__(kind)
    RewardModelJudge.__init__(judge, Context(NoSource(), tokenizer, roles))
    judge._known, judge.asked, judge.template = {}, None, None  # of the finished one: no scores yet, no templates
    texts = [Response("w9 w8", [9, 8], False), Response("w9 w8", [9, UNK, 8, OTHER], True), Response("w9", [9, EOS])]
    ids = [[9, 8], [9, UNK, 8, OTHER] if same else [9, 8, EOS], [9, EOS]]
    prompts = [Prompt("w5 w6", f"w{20 + i}") for i in range(3)]
    with torch.no_grad():
        ours = roles.last_token_scores("reward", Sequences.from_lists([[5, 6]] * 3, ids))
        theirs = roles.last_token_scores(
            "reward", Sequences.from_lists([[5, 6]] * 3, [[20 + i, EOS] for i in range(3)])
        )
    torch.testing.assert_close(torch.tensor(judge._scores(prompts, texts)), ours, rtol=1e-4, atol=1e-4)
    assert judge(prompts, texts) == [float(a > b) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
    sampled = [Prompt("w5 w6", text) for text in reversed(texts)]
    assert judge(sampled, texts)[1] == 0.5  # the same ids on both sides


def test_a_reward_model_learns_no_end_that_was_not_sampled() -> None:
    stage = SimpleNamespace(tokenizer=word_tokenizer(), reward=SimpleNamespace(max_length=9, margin_coef=0.0))
    rows = [SampledComparison("w5", "w7", "w8 w9", chosen_ended=True, rejected_ended=False)]
    assert RewardModeling.encode(stage, rows) == [(([5], [7, EOS]), ([5], [8, 9]))]  # type: ignore[arg-type]


# -- exported models in plain transformers -----------------------------------------------------------------------------


def tiny_gpt2(tokenizer: Any, **options: Any) -> PreTrainedModel:
    """GPT-2 has absolute positions, tied embeddings, and no spare rows beyond the tokenizer's vocabulary."""
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **options}
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).eval()


@pytest.fixture
def published(tmp_path: Path) -> ModelSettings:
    """A published GPT-2: its pad token is its EOS, and it stops at other ids and samples with other options."""
    tokenizer = gpt2()
    model = tiny_gpt2(tokenizer, pad_token_id=tokenizer.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    # options that `save_pretrained` would refuse
    config = {"eos_token_id": [65, tokenizer.eos_token_id], "temperature": 0.5, "top_k": 1, "do_sample": False}
    (tmp_path / "base/generation_config.json").write_text(str(config).replace("'", '"').replace("False", "false"))
    return ModelSettings("x", str(tmp_path / "base"), max_prompt_tokens=32)


def test_an_exported_policy_stops_where_it_stopped_here(published: ModelSettings, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(published)
    model = load_causal_lm(published, tokenizer)
    stops = stop_ids(tokenizer, model)
    assert stops == (256, 65)
    save_model(model, tokenizer, tmp_path / "model")
    plain, known = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert stop_ids(known, plain) == stops
    assert (plain.config.eos_token_id, plain.generation_config.eos_token_id) == (256, [256, 65])
    assert known.pad_token_id == plain.config.pad_token_id == plain.generation_config.pad_token_id
    assert plain.generation_config.pad_token_id not in stops
    assert known.padding_side == "left"
    batch = known(["Name tea.", "Hi"], return_tensors="pt", padding=True)
    torch.manual_seed(0)
    for _ in range(8):
        out = plain.generate(**batch, max_new_tokens=30, do_sample=True, top_k=0)[:, batch["input_ids"].shape[1] :]
        for row in out.tolist():
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            assert set(row[end + 1 :]) <= {known.pad_token_id}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "head on the SFT model"])
def test_a_padded_batch_of_an_exported_reward_model_is_scored_as_here(
    published: ModelSettings, tmp_path: Path, whole: bool
) -> None:
    """The scores of a reward adapter depend on the SFT model's config."""
    tokenizer = load_tokenizer(published)
    save_model(load_causal_lm(published, tokenizer), tokenizer, tmp_path / "sft")
    roles = Roles(load_causal_lm(published, tokenizer, tmp_path / "sft"))
    roles.table["reward"] = Role("base", None)
    head = roles.add_head("reward", zero=False).weight.data.normal_(generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "sft"
    if whole:
        folder = tmp_path / "reward"
        save_full_reward(roles, tokenizer, tmp_path / "sft", folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    plain.score.weight.data = head
    known = AutoTokenizer.from_pretrained(folder)
    assert known.padding_side == ("right" if whole else "left")
    prompts = known(["Name tea.", "Hi", "A longer prompt"])["input_ids"]
    responses = [[70, 256], [71, 72], [65, 256]]
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    batch = known.pad({"input_ids": texts}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        expected = roles.last_token_scores("reward", Sequences.from_lists(prompts, responses))
        torch.testing.assert_close(plain(**batch).logits[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_beside_a_reward_adapter_pads_for_scoring(tmp_path: Path) -> None:
    roles, tokenizer = seeded_roles(), word_tokenizer()
    for role, side in (("policy", "left"), ("reward", "right")):
        save_adapter(roles, role, tiny_lora(), tmp_path, tokenizer, tmp_path / role)
        assert AutoTokenizer.from_pretrained(tmp_path / role).padding_side == side
    assert tokenizer.padding_side == "right"  # unchanged
