"""docs/combinations.md: each line is refused with its sentence, and of all other combinations none is."""

import random
import re

import pytest

from rlhf import root
from rlhf.errors import ConfigError
from rlhf.pipeline.identity import idle
from rlhf.policy_settings import METHODS
from tests.helpers.composed_config import compose_and_check

PAGE = (root() / "docs" / "combinations.md").read_text()
LINES = re.findall(r"^\| `([^`]+)` \| (.+) \|$", PAGE, re.MULTILINE)
CPU = "trainer.accelerator=cpu"


def options(group: str) -> list[str]:
    return [f"{group}={path.stem}" for path in sorted((root() / "conf" / group).glob("*.yaml"))]


# The axes. A choice is a command's words; the defaults that lines of the page name are among them.
AXES = [
    options("divergence"),
    [f"kl.placement={place}" for place in ("auto", "reward", "loss", "both")],
    ["kl.importance_weight=false", "kl.importance_weight=true"],
    options("reference"),
    options("advantages"),
    [f"stage={method}" for method in METHODS],
    ["lora=r8", "lora=r8_all", "lora=none", "lora=r8 lora.dora=true"],
    options("quantization"),
    ["trainer=cpu", f"trainer=ddp trainer.devices=2 {CPU}", f"trainer=fsdp trainer.devices=2 {CPU}"],
    ["lora@sft.lora=none", "lora@sft.lora=r8"],
    [
        "generation.engine=native model.dtype=float32",
        "generation.engine=transformers model.dtype=bfloat16",
        "generation.engine=vllm model.dtype=bfloat16",
        "generation.engine=vllm model.dtype=float32",
    ],
]
KINDS = {
    "reference=sync": "reference=ema",
    "advantages=grpo": "advantages=rloo",
    "advantages=dr_grpo": "advantages=rloo",
    "quantization=int8": "quantization=nf4",
    "divergence=none": "divergence=none",
}
NO_VLLM = re.compile("torch sees no GPU here|pip install")  # said last: all else has passed


def kind(word: str) -> str:
    """The option that stands for this one on the page."""
    if word.startswith("divergence=") and word not in KINDS:
        return "divergence=exact_kl" if "exact" in word else "divergence=clamped_kl"
    return KINDS.get(word, word)


def sentences(words: list[str]) -> list[str]:
    """The sentences of all lines that cover a combination."""
    chosen = set(map(kind, words))
    return [sentence for line, sentence in LINES if set(line.split()) <= chosen]


def refusal(words: list[str]) -> str | None:
    """Why a combination is refused; None if it is not."""
    try:
        compose_and_check(*words)
    except ConfigError as error:
        return None if NO_VLLM.search(str(error)) else str(error)
    return None


@pytest.mark.long
@pytest.mark.parametrize(("line", "sentence"), LINES, ids=[line for line, _ in LINES])
def test_a_line_is_refused_with_its_sentence(line: str, sentence: str) -> None:
    found = refusal([*line.split(), *([CPU] if "trainer=" in line else [])])
    assert found is not None
    assert found.startswith(sentence)
    assert "; allowed: " in found or "; choose " in found


@pytest.mark.long
def test_exactly_what_a_line_covers_is_refused() -> None:
    """Forty combinations that no line covers, and forty that one does, whatever else is chosen with it."""
    stream, left = random.Random(7), {True: 40, False: 40}
    while any(left.values()):
        words = " ".join(stream.choice(axis) for axis in AXES).split()
        expected = sentences(words)
        if not left[bool(expected)]:
            continue
        left[bool(expected)] -= 1
        found = refusal(words)
        if not expected:
            assert found is None, (words, found)
            continue
        assert found is not None, words
        for option in set(words):  # the sentence names the option itself, the page the one that stands for its kind
            found = found.replace(option, kind(option))
        found = found.replace("reference.Sync", "reference.EMA")
        assert any(found.startswith(sentence) for sentence in expected), (words, found)


def test_the_page_says_which_groups_only_ppo_reads() -> None:
    named = re.search(r"`stage=ppo` alone, as do `(\w+)`, `(\w+)`, `(\w+)` and `(\w+)`", PAGE)
    assert named
    for method in METHODS:
        read = set() if method == "ppo" else {"advantages", *named.groups()}
        assert idle(method) == read | set(METHODS) - {method}
