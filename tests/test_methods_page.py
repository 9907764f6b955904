"""docs/methods.md: its commands pass all checks that come before a model is loaded, and what it says is refused is."""

import re
import shlex
from itertools import product

import pytest

from rlhf import root
from rlhf.errors import ConfigError
from rlhf.pipeline.training_checks import check_best_of_n
from rlhf.policy_settings import METHODS
from tests.helpers.composed_config import compose_and_check, composed_settings

PAGE = (root() / "docs" / "methods.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line)[1:] for block in BLOCKS for line in block.splitlines()]


def jobs(words: list[str]) -> list[tuple[str, ...]]:
    """The jobs of a command: with -m one for each combination."""
    if words[0] != "-m":
        return [tuple(words)]
    axes = [
        [f"{key}={value}" for value in values.split(",")] for key, _, values in (w.partition("=") for w in words[1:])
    ]
    return list(product(*axes))


@pytest.mark.parametrize("job", [job for words in COMMANDS for job in jobs(words)], ids=" ".join)
def test_a_command_of_the_page_is_understood(job: tuple[str, ...]) -> None:
    compose_and_check(*job)


REFUSED = [
    (["stage=dpo", "data=imdb", "scorer=gold"], "stage=dpo learns from comparisons"),
    (["stage=dpo", "dpo.loss=ipo", "dpo.divergence=forward_kl"], "dpo.divergence=forward_kl: .*reverse_kl"),
    (["stage=dpo", "dpo.loss=hinge", "dpo.clip=1"], "dpo.clip=1.* bounds a margin"),
    (["stage=dpo", "dpo.unbiased=true"], "dpo.unbiased=true .*dpo.label_smoothing"),
    (["stage=dpo", "dpo.alpha=1"], "dpo.alpha=1.* is not allowed; allowed: a number between 0 and 1"),
    (["stage=dpo", "dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5 is not allowed"),
    (
        ["stage=dpo", "dpo.divergence=total_variation"],
        "dpo.divergence=total_variation is not allowed",
    ),
    (["stage=dpo", "dpo.warmup_steps=125"], "dpo.warmup_steps=125 must be below dpo.steps=125"),
    (["stage=dpo", "lora=none", "quantization=nf4"], "lora=none trains the base itself"),
    (
        ["stage=dpo", "lora=none", "model.dtype=bfloat16", "dpo.keep_evaluated=true"],
        "dpo.keep_evaluated=true with lora",
    ),
    (["stage=dpo", "judge=none", "dpo.patience=2"], "dpo.patience=2 needs a metric .*dpo.keep_best=auto"),
    (["stage=dpo", "dpo.keep_best=eval/nothing"], "dpo.keep_best=eval/nothing is not allowed"),
    (
        ["stage=dpo", "dpo.microbatch_tokens=auto"],
        "^dpo.microbatch_tokens=auto is not allowed; allowed: a whole number$",
    ),
    (["stage=best_of_n", "best_of_n.n=1"], "best_of_n.n=1 leaves nothing to choose from"),
    (["stage=expert_iteration", "expert_iteration.rounds=7"], "expert_iteration.rounds=7 does not divide .*steps=40"),
    (["stage=expert_iteration", "expert_iteration.epochs=7"], "expert_iteration.epochs=7 does not divide the 640"),
    (["stage=best_of_n", "best_of_n.warmup_steps=40"], "best_of_n.warmup_steps=40 must be below"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_does_not_compose_is_refused_in_a_sentence(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_and_check(*overrides)


def test_the_keys_of_a_method_that_is_not_chosen_are_not_checked_against_each_other() -> None:
    compose_and_check("stage=ppo", "dpo.warmup_steps=125", "expert_iteration.rounds=7")
    compose_and_check("stage=dpo", "ppo.warmup_steps=40", "ppo.minibatch_size=7")


def test_the_page_names_every_method_and_says_how_much_is_sampled() -> None:
    assert all(f"`{method}`" in PAGE for method in METHODS)
    settings = composed_settings()
    assert settings.ppo.steps * settings.ppo.rollout_batch_size == 3840
    assert settings.best_of_n.n * settings.best_of_n.prompts_per_round == 40960
    own = settings.expert_iteration
    assert own.rounds * own.prompts_per_round == settings.best_of_n.prompts_per_round
    equal = composed_settings("best_of_n.n=4", "best_of_n.steps=15")
    check_best_of_n(equal, "best_of_n")
    assert equal.best_of_n.n * equal.best_of_n.prompts_per_round == 3840
