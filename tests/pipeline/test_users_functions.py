"""Functions of the user are tried before anything is trained; their failures are named with file and line."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.pipeline.users_functions import named_function, try_divergence
from rlhf.policy_settings import DivergenceSettings
from tests.helpers.command_line import TINY, error_sentence

OWN = """import torch


def right(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).abs()


def exact(logits, ref_logits):
    return (logits.softmax(-1) * (logits.log_softmax(-1) - ref_logits.log_softmax(-1))).sum(-1)


def mean(logprobs, ref_logprobs):
    return (logprobs - ref_logprobs).mean()


def broken(logprobs, ref_logprobs):
    return torch.cat([logprobs, 1.0])


def infinite(logprobs, ref_logprobs):
    return logprobs / torch.zeros_like(logprobs)


def constant(logits, ref_logits):
    return exact(logits, ref_logits).detach()


def length(prompts, responses):
    return [len(response) for response in responses]


def last_word(prompts, responses):
    return [float(response.split()[99]) for response in responses]


def one_for_all(prompts, responses):
    return 1.0


def nothing(prompts, responses):
    pass
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "own_typo.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    import sys

    sys.modules.pop("own_parts", None)


@pytest.mark.parametrize(("name", "takes"), [("right", "logprobs"), ("exact", "logits")])
def test_a_right_divergence_passes(name: str, takes: str) -> None:
    try_divergence(DivergenceSettings(name, f"own_parts.{name}", takes))


@pytest.mark.parametrize(
    ("name", "takes", "said"),
    [
        (
            "mean",
            "logprobs",
            r"returned shape \(\) for two tensors of shape \(2, 3\); allowed: a penalty",
        ),
        ("right", "logits", r"returned shape \(1, 3, 5\) for .* allowed: a penalty for each token, shape \(1, 3\)"),
        ("nothing", "logprobs", "returned NoneType for two tensors"),
        ("broken", "logprobs", r"failed on .*: \S*own_parts.py, line 17, in broken: TypeError: "),
        ("infinite", "logprobs", r"returned \[-inf, .* allowed: finite numbers"),
        ("constant", "logits", "has no gradient, and with divergence.input=logits it is a term of the loss"),
    ],
)
def test_a_divergence_that_cannot_be_used(name: str, takes: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^divergence\.function=own_parts\.{name} {said}"):
        try_divergence(DivergenceSettings(name, f"own_parts.{name}", takes))


def test_a_module_that_is_not_found_or_not_python() -> None:
    with pytest.raises(ConfigError, match=r"No module named 'nosuch' \(its folder must be on PYTHONPATH\); allowed"):
        named_function("scorer.function", "nosuch.f")
    with pytest.raises(ConfigError, match=r"own_typo.f cannot be imported: .*(SyntaxError|invalid syntax)"):
        named_function("scorer.function", "own_typo.f")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("last_word", "own_parts.py, line 33, in last_word: IndexError: list index out of range"),
        ("one_for_all", "returned 1.0 for 2 responses; allowed: a list of as many numbers"),
        ("nothing", "returned None for 2 responses; allowed: a list of as many numbers"),
    ],
)
def test_a_reward_that_fails_is_found_before_anything_is_trained(command: Callable, name: str, said: str) -> None:
    code, out, err = command(*TINY, "scorer=function", f"scorer.function=own_parts.{name}")
    assert code == 2, out + err
    assert said in error_sentence(err)
    assert not list(Path("outputs").glob("cache/*sft*"))


def test_a_bug_of_ours_ends_in_its_traceback(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.pipeline.checks.check", len)  # which takes other arguments
    with pytest.raises(TypeError):
        command(*TINY, "dry_run=true")
