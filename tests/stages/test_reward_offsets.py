"""What explains a preference besides the score: lengths and margins in its loss; bounded scores (PAR)."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.data.records import Comparison, ScoredComparison
from rlhf.errors import ConfigError, DataError
from rlhf.rollout.sample import Rollouts
from rlhf.scorers import totals
from rlhf.stages.reward_offsets import fit_length_coef
from tests.helpers.composed_config import compose_and_check
from tests.helpers.ppo_stages import make_ppo, ppo_settings, train
from tests.helpers.supervised_stages import COMPARISONS, reward_stage

MARGINS = [0.5, None, 2.0, 1.0, None, 3.0, 0.1, 0.2, 0.3, 0.4]
SCORED = [
    ScoredComparison(row.prompt, row.chosen, row.rejected, margin)
    for row, margin in zip(COMPARISONS, MARGINS, strict=True)
]


@pytest.mark.parametrize("more", [{}, {"token_coef": 0.5}, {"lm_coef": 0.1}])
def test_the_loss_explains_what_is_said_to_be_explained(folders: SimpleNamespace, more: dict[str, float]) -> None:
    """−log σ(margin + α Δlength − γ · the data's margin), in the plain loss and beside the auxiliary ones."""

    def loss(**options: Any) -> Tensor:
        stage = reward_stage(folders, **options)
        batch = stage.collate(stage.encode(SCORED))
        with torch.no_grad():
            return stage.loss(batch)[0], -stage.scores(batch).diff()[:, 0], batch  # type: ignore[return-value]

    plain, margins, batch = loss(**more)
    explained, again, _ = loss(length_coef=0.3, margin_coef=2.0, **more)
    torch.testing.assert_close(margins, again)
    lengths = batch.texts.response_lengths[batch.sides]
    offsets = 0.3 * (lengths[:, 0] - lengths[:, 1]) - 2.0 * torch.tensor([margin or 0.0 for margin in MARGINS])
    expected = plain + F.logsigmoid(margins).sum() - F.logsigmoid(margins + offsets).sum()
    torch.testing.assert_close(explained, expected, rtol=1e-5, atol=1e-5)
    assert abs(float(explained - plain)) > 0.1


def test_a_fitted_length_coefficient_is_the_maximum_of_the_likelihood() -> None:
    """Longer by one token and chosen 3 times of 4: σ(α) = ¾, α = log 3. Where length decides all, it is bounded."""

    def pair(chosen: int, rejected: int) -> Any:
        return ([1], [2] * chosen), ([1], [2] * rejected)

    assert fit_length_coef([pair(2, 1)] * 3 + [pair(1, 2)]) == pytest.approx(math.log(3), rel=1e-6)
    assert fit_length_coef([pair(2, 1), pair(1, 2)]) == pytest.approx(0, abs=1e-9)
    assert fit_length_coef([pair(9, 2)]) == 10.0
    assert fit_length_coef([pair(2, 9)]) == -10.0
    with pytest.raises(DataError, match=r"^reward\.length_coef=auto: both answers of every comparison"):
        fit_length_coef([pair(3, 3)])


def test_a_length_coefficient_takes_length_out_of_the_score(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Where the longer answer is always chosen, the explained part leaves the score less to learn from."""
    from rlhf.stages.batches import SeededBatches
    from tests.helpers.training import fit

    rows = [Comparison(row.prompt, f"{row.chosen} w3 w4 w5 w6 w7 w8 w9", row.chosen) for row in COMPARISONS]
    found = {}
    for coef in (0.0, 1.0):
        stage = reward_stage(folders, length_coef=coef, log_every=1)
        pairs = stage.encode(rows)
        fit(stage, pairs, SeededBatches(len(rows), len(rows), 0, 8), tmp_path / str(coef))
        with torch.no_grad():
            found[coef] = -float(stage.scores(stage.collate(pairs)).diff().mean())
    assert found[1.0] < found[0.0] - 0.1


def test_margins_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.margin_coef=1\.0: the comparisons have no margins"):
        compose_and_check("reward.margin_coef=1")
    with pytest.raises(ConfigError, match=r"^reward\.length_coef=much is not allowed; allowed: a number, or auto"):
        compose_and_check("reward.length_coef=much")


# -- PAR ---------------------------------------------------------------------------------------------------------------


def longer_is_better(rollouts: Rollouts) -> Tensor:
    return rollouts.mask.sum(1).float()


def test_par_is_the_chance_of_beating_the_references_answers(folders: SimpleNamespace, tmp_path: Path) -> None:
    """The mean of σ(score − reference's score) over the reference's answers to the same prompt, in (0, 1)."""
    settings = ppo_settings(score_transform="par", reference_answers=3, missing_eos_penalty=0.0, steps=1)
    stage = make_ppo(settings, folders, tmp_path / "samples")
    asked: list[Rollouts] = []

    def scorer(rollouts: Rollouts) -> Tensor:
        asked.append(rollouts)
        return longer_is_better(rollouts)

    stage.scorer = scorer
    (row,) = train(stage, tmp_path)
    theirs, ours = asked
    assert theirs.prompts == [prompt for prompt in ours.prompts for _ in range(3)]
    answers = list(zip(*[iter(totals(longer_is_better(theirs)).tolist())] * 3, strict=True))
    expected = [
        sum(1 / (1 + math.exp(other - own)) for other in others) / 3
        for own, others in zip(longer_is_better(ours).tolist(), answers, strict=True)
    ]
    assert row["ppo/reward"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert 0 < row["ppo/reward"] < 1


def test_par_of_the_reference_itself_is_one_half_on_average(folders: SimpleNamespace, tmp_path: Path) -> None:
    settings = ppo_settings(score_transform="par", reference_answers=8, missing_eos_penalty=0.0, steps=1)
    stage = make_ppo(settings, folders, tmp_path / "samples", warm=False)
    stage.scorer = longer_is_better
    (row,) = train(stage, tmp_path)
    assert row["ppo/reward"] == pytest.approx(0.5, abs=0.25)
