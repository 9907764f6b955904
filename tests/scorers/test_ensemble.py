"""Several reward models as one scorer: the members' scores, how they are combined, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models.assembly import ppo_roles
from rlhf.models.export import save_adapter
from rlhf.models.sequences import Sequences
from rlhf.scorers import Context
from rlhf.scorers.ensemble import COMBINE, Ensemble
from tests.helpers.composed_config import compose_and_check
from tests.helpers.ppo_stages import ppo_settings
from tests.helpers.scorer_context import NoSource
from tests.helpers.tiny_models import tiny_lora, tiny_roles


def test_combinations_agree_with_hand_computation() -> None:
    """Of the scores 1, 2, 6: mean 3, lowest 1, variance (4 + 1 + 9) / 3; two members that agree have none."""
    scores = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    expected = {"mean": [3.0, 5.0], "worst_case": [1.0, 5.0], "uncertainty_weighted": [3 - 0.5 * 14 / 3, 5.0]}
    assert expected.keys() == COMBINE.keys()
    for name, numbers in expected.items():
        torch.testing.assert_close(COMBINE[name](scores, 0.5), torch.tensor(numbers))


@pytest.fixture(scope="module")
def members(folders: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two reward models on the SFT model of `folders`, with other adapters and other heads."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        roles = tiny_roles()
        for parameter in roles.adapter_parameters("base", "reward").values():
            parameter.data.normal_(std=0.3)
        roles.heads["reward"].weight.data.normal_()
        made.append(tmp_path_factory.mktemp("members") / str(seed))
        save_adapter(roles, "reward", tiny_lora(), folders.sft, folders.tokenizer, made[-1])
    return made


ROWS = Sequences.from_lists([[3, 4], [5], [6, 7, 8]], [[9, 10, 1], [11, 1], [12, 13, 14]])


def test_each_member_scores_as_if_it_were_alone(folders: SimpleNamespace, members: list[Path]) -> None:
    """On one base, each less its own mean score of demonstrations."""
    settings, every = ppo_settings(), [folders.reward, *members]

    def score(reward: Path, others: list[Path]) -> torch.Tensor:
        roles = ppo_roles(settings, folders.tokenizer, folders.sft, reward, None, members=others).eval()
        assert list(roles.trunks) == ["base"]
        baselines = [(f"reward_{number}", float(number)) for number in range(1, len(others) + 1)]
        context = Context(NoSource(), folders.tokenizer, roles, reward_baseline=0.5, members=baselines)
        return Ensemble(context, len(others) + 1).score(ROWS)

    together = score(every[0], every[1:])
    alone = torch.cat([score(reward, []) for reward in every]) + torch.tensor([[0.0], [-0.5], [-1.5]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.std(0).min() > 0.01


def test_members_change_no_other_weight(folders: SimpleNamespace, members: list[Path]) -> None:
    """Policy, value function and their random weights are those of a run with one reward model; no member learns."""
    torch.manual_seed(0)
    alone = ppo_roles(ppo_settings(), folders.tokenizer, folders.sft, folders.reward, None)
    torch.manual_seed(0)
    beside = ppo_roles(ppo_settings(), folders.tokenizer, folders.sft, folders.reward, None, members=members)
    found = dict(beside.named_parameters())
    for name, parameter in alone.named_parameters():
        assert torch.equal(found[name], parameter)
        assert found[name].requires_grad == parameter.requires_grad
    assert not any(parameter.requires_grad for name, parameter in found.items() if "reward_" in name)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ("scorer.members=1", "scorer.members=1 is not allowed; allowed: a whole number from 2 to 32"),
        ("scorer.combine=best", "scorer.combine=best is not allowed; allowed: mean, worst_case, uncertainty_weighted"),
        ("scorer.uncertainty_coef=-1", "scorer.uncertainty_coef=-1 is not allowed"),
        ("reward.average_of=2", "scorer.members=4 and reward.average_of=2 both make reward models of it"),
        ("lora@reward.lora=none", "with lora@reward.lora=none each would be a whole model of its own"),
        ("model@reward.model=smollm2_135m", "needs reward models on the policy's own base"),
        ("reward.from=a/b", "trains reward models of different seeds, and reward.from=a/b is one that exists"),
    ],
)
def test_what_cannot_be_an_ensemble_is_refused(chosen: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_and_check("data=farm", "scorer=ensemble", chosen)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
