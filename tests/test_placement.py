"""Where a penalty acts: each line of the table in docs/divergences.md, by enumerating all responses of a toy policy."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlhf import root
from rlhf.divergence import configured
from rlhf.errors import ConfigError
from rlhf.pipeline.config import instantiate, settings_of
from rlhf.pipeline.users_functions import try_divergence
from rlhf.placement import Placement
from tests.helpers.composed_config import composed, composed_plan, composed_settings
from tests.helpers.enumeration import MASK, RESPONSES, STATES, Toy, logits, probabilities

PAGE = (root() / "docs" / "divergences.md").read_text()
LINES = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\| .* \| (?:reward|loss|both) \| (?:true|false) \|.*\|$", PAGE, re.MULTILINE)
]
# the claims of the table, as functions of the toy with the estimator in question, and of that with k1
CLAIMS = {
    "0": lambda _, kl: torch.zeros_like(kl.policy),
    "KL, whole responses": lambda _, kl: kl.of_responses(),
    "KL, each state": lambda _, kl: kl.of_states(),
    "KL(π_ref ‖ π), each state": lambda _, kl: Toy(kl.policy, kl.sampler, kl.reference, plain_forward_kl).of_states(),
    "D, whole responses": lambda toy, _: toy.of_responses(),
    "D, each state": lambda toy, _: toy.of_states(),
    "D, later states": lambda toy, _: toy.of_responses() - toy.of_states(),
}
DIVERGENCES = {
    path.stem: composed_settings(f"divergence={path.stem}").divergence
    for path in (root() / "conf" / "divergence").glob("*.yaml")
}
KINDS = {
    "every sampled one": [name for name, chosen in DIVERGENCES.items() if chosen.input == "logprobs"],
    "every exact one": [name for name, chosen in DIVERGENCES.items() if chosen.input == "logits"],
}
SCORES = torch.randn(len(RESPONSES), generator=torch.Generator().manual_seed(5), dtype=torch.double)


def plain_forward_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(π_ref ‖ π) = E[(π_ref / π) log(π_ref / π)] under π."""
    return (ref_logprobs - logprobs).exp() * (ref_logprobs - logprobs)


def toy(name: str, on_policy: bool = True, uniform: bool = False) -> Toy:
    chosen = DIVERGENCES[name]
    policy = torch.zeros_like(logits(1)) if uniform else logits(1)
    sampler = policy if on_policy else logits(3)
    return Toy(policy, sampler, logits(2), configured(chosen), chosen.input == "logits")


def placed(word: str, weighted: bool = False, name: str = "kl") -> Placement:
    return Placement.of(SimpleNamespace(placement=word, importance_weight=weighted), DIVERGENCES[name])


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # exact divergences are computed in float32


def test_all_responses_are_enumerated() -> None:
    assert (len(RESPONSES), len(STATES), int(MASK.sum())) == (15, 7, 41)
    assert float(probabilities(logits(1)).sum()) == pytest.approx(1)


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_a_line_of_the_documented_table_is_true(line: list[str]) -> None:
    described, word, weighted, *claims = line
    for name in KINDS.get(described, [described]):
        for on_policy, claim in zip((True, False), claims, strict=True):
            mine, kl = toy(name, on_policy), toy("kl", on_policy)
            found = mine.updates(placed(word, weighted == "true", name))
            truths = {claimed for claimed, gradient in CLAIMS.items() if near(found, gradient(mine, kl))}
            assert (claim in truths) if claim != "–" else not truths, (name, on_policy, truths)


def test_the_table_has_all_of_the_papers_three_estimators() -> None:
    assert len(LINES) == 19
    for name in ("kl", "squared_error", "bregman"):
        assert {(word, weighted) for described, word, weighted, *_ in LINES if described == name} >= {
            ("reward", "false"), ("loss", "false"), ("loss", "true"), ("both", "false"),
        }  # fmt: skip


def test_k1_in_the_reward_and_k2_in_the_loss_have_one_scale() -> None:
    reward, loss = toy("kl"), toy("squared_error").updates(placed("loss"))
    assert near(reward.updates(placed("reward"), gamma=0.0), loss)
    assert not near(reward.updates(placed("reward")), loss)
    later = toy("exact_kl").updates(placed("reward", name="exact_kl"))
    assert later.abs().max() > 0.01
    assert near(reward.updates(placed("reward")), loss + later)


def test_weighted_in_both_places_the_loss_adds_what_the_surrogate_of_the_reward_lacks() -> None:
    mine = toy("bregman", on_policy=False)
    of_the_loss = mine.updates(placed("both", True)) - mine.updates(placed("reward"))
    assert near(of_the_loss, mine.of_states(omitted=True))


@pytest.mark.parametrize(("name", "word"), [("kl", "reward"), ("squared_error", "loss"), ("exact_kl", "both")])
def test_whitening_divides_penalty_and_score_alike(name: str, word: str) -> None:
    mine, placement = toy(name, uniform=True), placed(word, name=name)
    plain = mine.updates(placement, SCORES)
    _, scale = mine.advantages(placement, SCORES, whiten_advantages=True)
    assert float(scale) != pytest.approx(1, abs=0.05)
    assert near(mine.updates(placement, SCORES, whiten_advantages=True), plain * scale)


@pytest.mark.parametrize(("name", "word"), [("kl", "reward"), ("squared_error", "loss"), ("exact_kl", "both")])
def test_whitened_rewards_also_pay_for_length(name: str, word: str) -> None:
    mine, placement = toy(name, uniform=True), placed(word, name=name)
    _, scale = mine.advantages(placement, SCORES, whiten_rewards=True)
    length = Toy(mine.policy, mine.sampler, mine.reference, lambda a, _: torch.ones_like(a)).of_responses()
    rewards = SCORES - (mine.penalty(mine.sampler).sum(1) if placement.reward else 0.0)
    mean = probabilities(mine.sampler) @ rewards / (probabilities(mine.sampler) @ MASK.sum(1).double())
    assert mean.abs() > 0.01
    whitened = mine.updates(placement, SCORES, whiten_rewards=True)
    assert near(whitened, mine.updates(placement, SCORES) * scale - mean * (1 - scale) * length)


@pytest.mark.parametrize(
    ("name", "word", "weighted", "said"),
    [
        ("kl", "value", False, "kl.placement=value is not allowed; allowed: auto, reward, loss or both"),
        ("none", "loss", False, "kl.placement=loss has no penalty to place with divergence=none"),
        ("none", "both", False, "kl.placement=both has no penalty to place with divergence=none"),
        ("exact_kl", "loss", True, "kl.importance_weight=true weights sampled tokens, and divergence=exact_kl sums"),
        ("kl", "reward", True, "kl.importance_weight=true weights a term of the loss, and kl.placement=reward"),
        ("kl", "auto", True, "kl.importance_weight=true weights a term of the loss, and kl.placement=auto"),
    ],
)
def test_what_cannot_be_placed_is_refused(name: str, word: str, weighted: bool, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        placed(word, weighted, name)


def test_by_default_sampled_estimators_are_in_the_reward_and_exact_ones_in_both() -> None:
    assert placed("auto") == Placement(reward=True, loss=False)
    assert placed("auto", name="exact_kl") == Placement(reward=True, loss=True)
    assert placed("auto", name="none") == Placement(reward=True, loss=False)
    assert Placement.of(object(), DIVERGENCES["kl"]) == Placement(reward=True, loss=False)  # a class of one's own


def test_by_default_a_run_keeps_the_identity_that_it_had_before_the_keys(tmp_path: Path) -> None:
    before = composed_plan(tmp_path, "~kl.placement", "~kl.importance_weight").identity
    assert composed_plan(tmp_path).identity == before
    others = [composed_plan(tmp_path, f"kl.placement={word}").identity for word in ("loss", "both")]
    assert len({before, *others}) == 3


@pytest.mark.parametrize("name", ["kl_placement", "divergence_family"])
def test_each_run_of_the_studies_composes_and_can_be_placed(name: str) -> None:
    axes = composed(f"experiments={name}", with_hydra=True).hydra.sweeper.params
    assert len(str(axes.replicate).split(",")) >= 3
    seen = set()
    for option in axes[rows := "variant" if "variant" in axes else "divergence"].split(","):
        config = composed(f"experiments={name}", f"{rows}={option}", "replicate=1")
        settings = settings_of(config)
        try_divergence(settings.divergence)
        seen.add((settings.divergence.name, Placement.of(instantiate(config.kl, "kl"), settings.divergence)))
    assert len(seen) == len(axes[rows].split(","))
