"""Further terms of the policy's loss: the entropy bonus, terms of one's own, texts mixed in; and their cost."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import ConfigError, DataError
from rlhf.models.heads import token_stats
from rlhf.models.sequences import Sequences
from rlhf.policy_settings import LossTermSettings
from rlhf.settings import LoraSettings
from rlhf.stages.loss_terms import PolicyTokens
from rlhf.stages.pretraining import PretrainingMix
from tests.helpers.composed_config import compose_and_check
from tests.helpers.memory_estimates import estimate_of
from tests.helpers.ppo_stages import LORA, make_ppo, ppo_settings, remove_reward_signal, train
from tests.helpers.training import record_gradients

TEXTS = [([5 + i, 7], [11 + i, 3 + 2 * i, 1]) for i in range(7)] + [([9], [30, 31, 32, 33, 34, 1])]


def run(folders: SimpleNamespace, folder: Path, only: bool = False, mix: Any = None, **options: Any) -> Any:
    """Train two steps; with `only`, nothing but the further terms has a gradient. The stage, its metrics, gradients."""
    terms = options.pop("terms", {})
    settings = ppo_settings(**options)
    settings.loss_terms = terms
    stage = make_ppo(settings, folders, folder / "samples")
    stage.mix = mix
    if only:
        stage.ppo.value_coef = 0.0
        make = stage.make_experience

        def without_reward(*given: Any) -> Any:
            experience = make(*given)
            remove_reward_signal(experience)
            return experience

        stage.make_experience = without_reward  # type: ignore[method-assign]
    with record_gradients() as seen:
        rows = train(stage, folder)
    return stage, rows, seen


def test_entropys_gradient_is_that_of_its_formula() -> None:
    """In one chunk and in several, against autograd through all probabilities."""
    torch.manual_seed(0)
    output, hidden = torch.nn.Linear(6, 9, bias=False), torch.randn(5, 6)
    targets = torch.arange(5)

    def gradient(entropy: Tensor, at: Tensor) -> Tensor:
        return torch.autograd.grad(entropy.sum(), at)[0]

    at = hidden.clone().requires_grad_()
    stats = token_stats(at, output, targets, 0.7, entropy=True, entropy_grad=True)
    probabilities = (output(at) / 0.7).softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(stats.entropy, expected)
    torch.testing.assert_close(gradient(stats.entropy, at), gradient(expected, at))  # type: ignore[arg-type]
    assert not token_stats(at, output, targets, 0.7, entropy=True).entropy.requires_grad  # type: ignore[union-attr]


def test_the_entropy_bonus_raises_entropy(folders: SimpleNamespace, tmp_path: Path) -> None:
    _, plain, _ = run(folders, tmp_path / "plain", only=True, steps=4, lr=0.05)
    _, rows, _ = run(folders, tmp_path / "bonus", only=True, steps=4, lr=0.05, entropy_coef=0.5)
    assert plain[-1]["ppo/entropy"] == pytest.approx(plain[0]["ppo/entropy"], rel=0.2)
    assert rows[-1]["ppo/entropy"] > plain[-1]["ppo/entropy"] + 0.2
    assert rows[0]["ppo/policy_loss"] == pytest.approx(0, abs=1e-6)  # the bonus is no part of it


def test_nothing_is_paid_for_what_is_not_chosen(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Coefficients of 0 leave every gradient the same to the bit."""
    _, _, plain = run(folders, tmp_path / "a")
    _, _, off = run(folders, tmp_path / "b", entropy_coef=0.0, ptx_coef=0.0)
    assert len(plain) == len(off) == 8
    for ours, theirs in zip(plain, off, strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


def squared_change(tokens: PolicyTokens) -> Tensor:
    assert tokens.ref_logprobs is not None
    assert tokens.entropy.requires_grad
    return (tokens.logprobs - tokens.ref_logprobs).square() / 2


def not_per_token(tokens: PolicyTokens) -> Tensor:
    return tokens.logprobs.sum()


def test_a_term_of_ones_own_is_weighted_and_reported(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Twice the coefficient is twice the gradient of the first step; what is reported has no coefficient."""
    term = f"{__name__}.squared_change"
    found = {}
    for coef in (0.25, 0.5):
        terms = {"near": LossTermSettings(term, coef)}
        _, rows, seen = run(folders, tmp_path / str(coef), only=True, terms=terms, max_grad_norm=None)
        found[coef] = seen[0]
        assert rows[0]["ppo/loss_near"] > 0
    compared = 0
    for once, twice in zip(found[0.25], found[0.5], strict=True):
        if once is not None and once.abs().max() > 0:
            torch.testing.assert_close(2 * once, twice, rtol=1e-4, atol=1e-8)
            compared += 1
    assert compared > 4
    with pytest.raises(ValueError, match=r"^loss_terms\.odd returned shape \(\) for \d+ tokens"):
        run(folders, tmp_path / "odd", terms={"odd": LossTermSettings(f"{__name__}.not_per_token")})


def mixed(coef: float = 2.0, size: int = 4, budget: int = 12) -> PretrainingMix:
    return PretrainingMix(TEXTS, coef, size, budget, seed=3, updates=4)


@pytest.mark.parametrize("lora", [LORA, LoraSettings(r=0)])
def test_mixed_texts_have_the_gradient_of_their_mean_loss(
    folders: SimpleNamespace, tmp_path: Path, lora: LoraSettings
) -> None:
    """γ times the mean over the tokens of the step's texts, however many micro-batches they are read in."""
    mix = mixed()
    still = {"steps": 1, "epochs": 1, "max_grad_norm": None, "warmup_steps": 0, "lr": 1e-12, "lr_full": 1e-12}
    stage, rows, seen = run(folders, tmp_path / "a", only=True, mix=mix, lora=lora, **still)
    drawn = [TEXTS[row] for row in mix.order.batch(0)]
    assert len(mix.parts(stage.passes, 1, 0, 10)) > 1
    batch = Sequences.from_lists([prompt for prompt, _ in drawn], [response for _, response in drawn])
    states = stage.roles.states("policy", batch, batch.predicting)
    loss = -stage.roles.token_stats("policy", states, batch.target_ids).logprobs.mean()
    trained = [p for p in stage.parameters() if p.requires_grad]
    expected = torch.autograd.grad(2.0 * loss, trained, allow_unused=True)
    compared = 0
    for ours, theirs in zip(seen[0], expected, strict=True):
        if theirs is not None and theirs.abs().max() > 0:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared > 4
    assert len(rows) == 1
    assert 0 < rows[0]["ppo/ptx_loss"] < 2 * math.log(50)


def test_each_step_has_texts_of_its_own_and_none_is_left_out(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Over two epochs of 8 texts; a step that is repeated after a kill has the same ones."""
    stage = make_ppo(ppo_settings(), folders, tmp_path / "samples")

    def drawn(step: int) -> list[tuple[int, ...]]:
        parts = [part for update in range(2) for part in mixed().parts(stage.passes, step, update, 10)]
        rows = [(ids, n) for part in parts for ids, n in zip(part.texts.ids.tolist(), part.texts.lengths, strict=True)]
        return [tuple(ids[:n]) for ids, n in rows]

    every = sorted(tuple(prompt + response) for prompt, response in TEXTS)
    assert sorted(drawn(1)) == every
    assert drawn(1) == drawn(1) != drawn(2)


def test_mixed_texts_keep_a_policy_good_at_them(folders: SimpleNamespace, tmp_path: Path) -> None:
    losses = [row["ppo/ptx_loss"] for row in run(folders, tmp_path, mix=mixed(size=8), steps=6)[1]]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (["ppo.ptx_coef=1", "ppo=as_published"], "ppo.ptx_coef=1.0: ppo.accumulation=as_published reproduces updates"),
        (["ppo.ptx_texts=some.jsonl"], "ppo.ptx_coef=0.0 mixes no texts into the updates"),
        (["ppo.ptx_coef=1", "ppo.ptx_texts=some.jsonl"], "ppo.ptx_texts=some.jsonl: some.jsonl does not exist"),
        (["ppo.entropy_coef=-1"], "ppo.entropy_coef=-1.0 is not allowed; allowed: a number of 0 or above"),
        (["loss_terms=[old_kl]", "loss_terms.old_kl.function=no.such"], "loss_terms.old_kl.function=no.such cannot be"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(chosen: Sequence[str], said: str) -> None:
    with pytest.raises((ConfigError, DataError)) as refused:
        compose_and_check(*chosen)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_the_estimate_counts_what_is_added() -> None:
    plain = estimate_of().phases["updating"]
    assert estimate_of("ppo.entropy_coef=0.01").phases["updating"] > plain
    assert estimate_of("loss_terms=[old_kl]").phases["updating"] > plain
    assert estimate_of("ppo.ptx_coef=1").phases["updating"] == plain  # one after the other, of the same size
    assert estimate_of("ppo.ptx_coef=1", "sft.max_length=20000").phases["updating"] > plain
