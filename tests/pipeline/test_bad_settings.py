"""Bad values of the configuration: each is refused in one sentence, before a model is built."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.command_line import error_sentence
from tests.helpers.composed_config import compose_and_check
from tests.helpers.data_readers import (
    assert_one_sentence,
)

# overrides of the default configuration, and the error message
CONFIGURED: list[tuple[str, str]] = [
    ("judge=null", "judge=null: judge is a config group; allowed: judge=finished_reward_model, gold, "),
    ("~judge", "judge=None has no _target_; allowed: finished_reward_model, gold, "),
    ("~scorer", "scorer=None has no _target_; allowed: bag_of_characters, bag_of_words, ensemble, function"),
    ("stage.name=orpo", "stage.name=orpo is not allowed; allowed: best_of_n, dpo, evaluate, expert_iteration, ppo, "),
    ("scorer._target_=os.getcwd", "scorer._target_=os.getcwd is no scorer"),
    ("judge._target_=nope", "judge._target_=nope cannot be imported"),
    ("data._target_=builtins.dict", "data._target_=builtins.dict is no data set"),
    ("data._target_=nope.Data", "data: .*nope"),
    ("data.people=-1", "data"),
    ("+data.nope=1", "data: .*nope"),
    ("data=alpaca judge=none data.on_bad_row=ignore", "on_bad_row='ignore' is not allowed; allowed: skip or fail"),
    ("data=alpaca judge=none data.max_rows=-1", "max_rows=-1 is not allowed; allowed: a positive integer"),
    ("data=alpaca judge=none data.sft='x.jsonl[5:2]'", "malformed slice"),
    ("data=alpaca judge=none data.template.without_input=x", "template.without_input must use exactly"),
    ("data=imdb judge=none scorer=sentiment data.shares.sft=2", "is not allowed; allowed: a mapping from some of"),
    ("data=stack_exchange judge=none data.root=/nope", "/nope/Posts.xml does not exist"),
    ("data.sft=x.jsonl[:5]", r"must be quoted; allowed: 'data.sft=\"x.jsonl\[:5\]\"', with both kinds"),
    ("data.sft=[a.jsonl[:5],b.jsonl]", r"allowed: 'data.sft=\[\"…\",\"…\"\]'"),
    ("data.sft=a.jsonl[:5],b.jsonl", r"allowed: 'data.sft=\"a.jsonl\[:5\]\",\"b.jsonl\"'"),
    ("data.sft={a:1", "data.sft={a:1: the command line cannot be parsed here"),
    ("divergence.function=os.nope", "divergence.function=os.nope cannot be imported"),
    ("divergence.input=words", "divergence.input=words is not allowed; allowed: logprobs, logits or none"),
    ("divergence=alpha divergence.alpha=-1", "divergence.alpha=-1 is not allowed; allowed: a number of 0 or above"),
    ("divergence=renyi divergence.alpha=0", "divergence.alpha=0 is not allowed; allowed: a number above 0"),
    ("divergence=alpha divergence.alpha=half", "divergence.alpha=half is not allowed; allowed: a number"),
    ("+divergence.alpha=0.5", "divergence.alpha: there is no such key; allowed: function, input, name"),
    ("divergence=alpha +divergence.alhpa=1", "divergence.alhpa: there is no such key, did you mean alpha"),
    ("kl.placement=value", "kl.placement=value is not allowed; allowed: auto, reward, loss or both"),
    ("divergence=none kl.placement=loss", "kl.placement=loss has no penalty to place with divergence=none"),
    ("kl=adaptive divergence=exact_kl kl.importance_weight=true", "kl.importance_weight=true weights sampled tokens"),
    ("divergence=kl kl.importance_weight=true", "kl.importance_weight=true weights a term of the loss"),
    ("kl.importance_weight=sometimes", "kl.importance_weight=sometimes is not allowed; allowed: true or false"),
    ("advantages=foo", "advantages=foo: there is no such option.*rloo"),
    ("advantages.function=os.nope", "advantages.function=os.nope cannot be imported"),
    ("advantages.function=math.fsum", "advantages.function=math.fsum failed on a batch of shape .*TypeError"),
    ("advantages.function=builtins.repr", ".*returned str for a batch of .*; allowed: a finite advantage for each"),
    ("advantages.baseline=mean", "advantages.baseline=mean is not allowed; allowed: value, group, greedy or none"),
    ("advantages=grpo advantages.options.divide_by_std=1", "advantages.options.divide_by_std=1 is not allowed; .*true"),
    ("advantages=grpo +advantages.options.divide_by_st=true", "no such key, did you mean divide_by_std"),
    ("advantages=rloo generation.samples_per_prompt=1", "advantages=rloo compares answers to a prompt; allowed: 2 or"),
    ("advantages=grpo generation.samples_per_prompt=6", "cuts the 6 answers to a prompt apart; allowed: a multiple of"),
    ("generation.samples_per_prompt=64", "ppo.minibatch_size=32 cuts the 64 answers to a prompt apart"),
    ("generation.samples_per_prompt=0", "generation.samples_per_prompt=0 is not allowed"),
    ("ppo.value_model=none", "ppo.value_model=none: advantages=gae needs a value function; allowed: adapter"),
    ("advantages=rloo ppo.value_model=full", "ppo.value_model=full: advantages=rloo uses no value function; .*none"),
    ("advantages=remax ppo.value_coef=0.1", "ppo.value_coef=0.1: advantages=remax uses no value function; allowed: 0"),
    ("advantages=grpo ppo.value_bias=true", "ppo.value_bias=True: advantages=grpo uses no value function"),
    ("advantages=grpo ppo.value_clip_range=0.2", "ppo.value_clip_range=0.2: .* uses no value function; allowed: null"),
    ("advantages=reinforce ppo.lam=0.9", "ppo.lam=0.9: advantages=reinforce uses no value function; allowed: 1"),
    ("ppo.dual_clip=1", "ppo.dual_clip=1.0 is not allowed; allowed: a number above 1, or null"),
    ("ppo.clip_range_high=0", "ppo.clip_range_high=0.0 is not allowed; allowed: a number above 0, or null"),
    ("ppo.ratio=word", "ppo.ratio=word is not allowed; allowed: token or sequence"),
    ("ppo.loss_aggregation=sum", "ppo.loss_aggregation=sum is not allowed; allowed: token_mean, sequence_mean or"),
    ("ppo=as_published ppo.ratio=sequence", "ppo.ratio=sequence: ppo.accumulation=as_published reproduces .*: token,"),
    ("advantages=grpo ppo=as_published", "ppo.loss_aggregation=sequence_mean: ppo.accumulation=as_published"),
    ("kl.coef=inf", "kl"),
    ("kl.coef=much", "kl"),
    ("replicate=-1", "replicate=-1 is not allowed; allowed: a whole number from 0"),
    ("replicate=many recipe=paper", "replicate=many is not allowed"),
    ("seed=-1", "seed=-1 is not allowed; allowed: a whole number from 0"),
    ("sft.seed=4294967296", "sft.seed=4294967296 is not allowed"),
    ("ppo.lr=inf", "ppo.lr=inf is not allowed; allowed: a number above 0"),
    ("ppo.lr=nan", "ppo.lr=nan is not allowed"),
    ("ppo.lr=null", "ppo.lr"),
    ("ppo.steps=1.5", "ppo.steps=1.5 is not allowed; allowed: a whole number"),
    ("ppo.steps=0", "ppo.steps=0 is not allowed"),
    ("ppo.schedule=cubic", "ppo.schedule=cubic is not allowed; allowed: linear, cosine or constant"),
    ("+ppo.accumulation=other", "ppo.accumulation=other is not allowed"),
    ("sft.epochs=-0.5", "sft.epochs=-0.5 is not allowed"),
    ("sft.loss_on=prompt", "sft.loss_on=prompt is not allowed; allowed: response, assistant or text"),
    ("reward.batch_size=[]", "reward.batch_size"),
    ("lora.r=-8", "lora.r=-8 is not allowed"),
    ("lora.target_modules=query", "lora.target_modules"),
    ("lora.target_modules=[c_attn]", "no linear layer named c_attn that .*; allowed: .*q_proj"),
    ("lora.target_modules=[q_proj,lm_head]", "no linear layer named lm_head that .*; allowed: .*q_proj"),
    ("lora@sft.lora=r8 sft.lora.target_modules=[lm_head]", "no linear layer named lm_head that .*; allowed: .*q_proj"),
    ("lora.target_modules=[embed_tokens]", "no linear layer named embed_tokens that .*; allowed: .*q_proj"),
    ("lora@reward.lora=r8 reward.lora.target_modules=[w1]", "reward.lora.target_modules: .* w1 that .*: .*q_proj"),
    ("model.dtype=float64", "model.dtype=float64 is not allowed; allowed: float32, bfloat16, float16 or auto"),
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
    ("data=imdb judge=none scorer=bag_of_words scorer.unit=syllable", "unit=syllable of a classifier is not allowed"),
    ("+scorer@evaluation.gold=reward_model", ".*RewardModelScorer does not score texts; allowed: bag_of_words, "),
    ("+evaluation.gold._target_=os.getcwd", "evaluation.gold._target_=os.getcwd does not score texts"),
    ("+scorer@evaluation.gold=bag_of_words", "evaluation.gold=.*learns from labelled reviews, which only data=imdb"),
    ("+scorer@evaluation.gold=function evaluation.gold.function=os.nope", "os.nope cannot be imported"),
    ("+scorer@evaluation.gold=function evaluation.gold.function=os.getcwd evaluation=factscore "
     "evaluation.factscore.model=x evaluation.factscore.entities=x", "evaluation.gold has no place"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), CONFIGURED, ids=[row[0] for row in CONFIGURED])
def test_a_bad_value_is_one_sentence_before_a_model_is_made(
    overrides: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf", *overrides.split()])  # the sentence may quote the command
    with pytest.raises(Exception) as failure:  # noqa: PT011  (`explain` decides which errors users see)
        compose_and_check(*overrides.split())
    assert_one_sentence(failure.value, expected)


@pytest.mark.slow
def test_the_command_itself_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf", "divergence=foo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "divergence=foo" in error_sentence(done.stderr)
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_so_is_a_file_of_data_that_cannot_be_read(command: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"{")
    files = [f"data.{split}=x.jsonl" for split in ("sft", "preference", "preference_validation", "prompts")]
    code, _, said = command("data=alpaca", "judge=reward_model", f"data.root={tmp_path}", "data.eval=null", *files)
    assert code == 2, said
    assert "x.jsonl" in error_sentence(said)
    assert not list(tmp_path.rglob("summary.json"))
