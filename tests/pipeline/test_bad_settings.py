"""Bad values of the configuration: each is refused in one sentence, before a model is built."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.composed_config import compose_and_check
from tests.helpers.data_readers import (
    assert_one_sentence,
)

# overrides of the default configuration, and the error message
CONFIGURED: list[tuple[str, str]] = [
    ("judge=null", "judge=null: judge is a config group; allowed: finished_reward_model, gold, "),
    ("~judge", "judge=None has no _target_; allowed: finished_reward_model, gold, "),
    ("~scorer", "scorer=None has no _target_; allowed: bag_of_characters, bag_of_words, function"),
    ("stage.name=dpo", "stage.name=dpo is not allowed; allowed: evaluate, ppo, preferences, reward, sft"),
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
    ("kl.coef=inf", "kl"),
    ("kl.coef=much", "kl"),
    ("replicate=-1", "replicate=-1 is not allowed; allowed: a whole number from 0"),
    ("replicate=many recipe=paper", "replicate=many is not allowed"),
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
    ("sft.loss_on=prompt", "sft.loss_on=prompt is not allowed; allowed: response, assistant or text"),
    ("reward.batch_size=[]", "reward.batch_size"),
    ("lora.r=-8", "lora.r=-8 is not allowed"),
    ("lora.target_modules=query", "lora.target_modules"),
    ("lora.target_modules=[c_attn]", "no linear layer named c_attn; allowed: .*q_proj"),
    ("lora.target_modules=[q_proj,lm_head]", "no linear layer named lm_head; allowed: .*q_proj"),
    ("lora@sft.lora=r8 sft.lora.target_modules=[lm_head]", "no linear layer named lm_head; allowed: .*q_proj"),
    ("lora.target_modules=[embed_tokens]", "no linear layer named embed_tokens; allowed: .*q_proj"),
    ("lora@reward.lora=r8 reward.lora.target_modules=[w1]", "lora@reward.lora.target_modules: .*w1; allowed: .*q_proj"),
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
def test_a_bad_value_is_one_sentence_before_a_model_is_made(overrides: str, expected: str) -> None:
    with pytest.raises(Exception) as failure:  # noqa: PT011  (`explain` decides which errors users see)
        compose_and_check(*overrides.split())
    assert_one_sentence(failure.value, expected)


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
