"""What the command line answers to a name that does not exist: what it is called here, or where it belongs."""

from collections.abc import Callable

import pytest

from tests.helpers.command_line import error_sentence

SAID = [
    # a misspelt option, group or key
    ("divergence=jenson_shannon", "divergence=jenson_shannon: there is no such option, did you mean jensen_shannon?"),
    ("divergance=kl", "divergance: there is no such key, did you mean divergence?"),
    ("guards.spikes.window=2", "did you mean spike?"),
    # what other libraries call it
    ("lora.rank=16", "lora.rank: there is no such key, did you mean r?"),
    ("ppo.learning_rate=1e-5", "ppo.learning_rate: there is no such key, did you mean lr?"),
    ("learning_rate=1e-5", "did you mean expert_iteration.lr, reward.lr, dpo.lr, ppo.lr, sft.lr or best_of_n.lr?"),
    ("+learning_rate=1e-5", "did you mean expert_iteration.lr, reward.lr, dpo.lr, ppo.lr, sft.lr or best_of_n.lr?"),
    ("ppo.kl_coef=0.1", "ppo.kl_coef: there is no such key, did you mean kl.coef?"),
    # the right key in the wrong place
    ("max_new_tokens=3", "did you mean evaluation.max_new_tokens or generation.max_new_tokens?"),
    # a group inside a group
    ("data/template=chat", "data/template: the chosen option of data has no template; allowed: data/template=alpaca, "),
    ("data.template=chat", "with data=alpaca, alpaca_farm, hub, mixture, stack_exchange"),
    ("data=alpaca data.template=chat", "data.template=chat is a text, did you mean data/template=chat?"),
    # what is no option, but can be had
    ("model=gpt2", "other models are model=custom model.name_or_path=HUB_ID_OR_FOLDER"),
    ("lora=r32", "another rank is lora=r8 lora.r=32"),
    # forms of an override
    ("seed=1,2", "seed=1,2: several values make a sweep, rlhf -m seed=1,2; allowed without -m: one value, or a list"),
    ("ppo", "ppo has no value; allowed: GROUP=OPTION, such as ppo=paper, or KEY=VALUE"),
    ("kl=0.1", "kl=0.1: kl is a config group; allowed: "),
    ("ppo.steps=abc", "ppo.steps=abc is not allowed; allowed: a whole number"),
    ("model.compile=perhaps", "model.compile=perhaps is not allowed; allowed: true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), SAID, ids=[row[0] for row in SAID])
def test_what_is_answered(command: Callable, arguments: str, said: str) -> None:
    code, _, err = command(*arguments.split())
    assert code == 2
    assert said in error_sentence(err)
