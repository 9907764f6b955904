"""Further reward models of a run: members of an ensemble (`scorer=ensemble`) or of an average (`reward.average_of`).

Member k is the reward model of the same configuration with the seed `reward.seed` + 1000 k, and lies in the cache under
the name that it has for itself. The seeds are far apart, so that the ensembles of reward.seed=0,1,2,… share no member.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from rlhf.data.records import DataSource
from rlhf.errors import ConfigError
from rlhf.files import MODEL
from rlhf.pipeline import cache
from rlhf.pipeline.config import needs_reward_model, nodes, settings_of, target_class
from rlhf.pipeline.fetching import data_sets
from rlhf.pipeline.plan import Plan
from rlhf.settings import Settings
from rlhf.tracking.summary import read_summary

STRIDE = 1000  # between the seeds of two members
PREFIX = "reward_member_"  # of the product that is a member


def ensemble_size(config: DictConfig) -> int:
    """The reward models that the scorer combines; 1 if it is no ensemble."""
    found = [node for node in nodes(config.scorer) if "_target_" in node and "members" in node]
    sizes = [node.members for node in found if getattr(target_class(node, "scorer"), "needs_members", False)]
    return max(sizes, default=1)


def needed(plan: Plan) -> dict[str, Path]:
    """`Plan.needed`, and before the reward model its members: those that score beside it, or that it averages.

    The members of an average are needed only until it is made.
    """
    folders = plan.needed()
    if plan.made_from is not None or "reward" not in folders:
        return folders
    average = plan.settings.reward.average_of
    first, last = (0, average) if average > 1 else (1, ensemble_size(plan.config) if plan.stage != "reward" else 0)
    if average > 1 and cache.known(plan.reward_folder):
        return folders
    members = {product_of(number): _member(plan, number).reward_folder for number in range(first, last)}
    return {key: path for key, path in folders.items() if key != "reward"} | members | {"reward": folders["reward"]}


def product_of(number: int) -> str:
    """The name of a member among the products of a run."""
    return f"{PREFIX}{number}"


def averaged(plan: Plan) -> list[Path]:
    """The members that the plan's reward model is the average of; none if it is trained."""
    count = plan.settings.reward.average_of
    return [_member(plan, number).reward_folder for number in range(count)] if count > 1 else []


def noted(plan: Plan) -> dict[str, Any]:
    """What the summary of a run says of its reward models."""
    name = plan.reward_folder.name if plan.needs_reward_model else None
    found = {"reward_model": name, "reward_reads": plan.reward_reads}
    others = [folder.parent.name for folder in scoring(plan)]
    return {**found, "reward_members": others} if others else found


def plan_of(plan: Plan, product: str) -> Plan:
    """The plan whose product this is: that of a run with the member as its reward model, or the run's own."""
    return _member(plan, int(product.removeprefix(PREFIX))) if product.startswith(PREFIX) else plan


def stage_of(product: str) -> str:
    """The stage that makes a product."""
    return "reward" if product.startswith(PREFIX) else {"reward_sft": "sft"}.get(product, product)


def scoring(plan: Plan) -> list[Path]:
    """The reward models that score beside the run's own, for `rlhf.models.assembly.ppo_roles`."""
    if plan.settings.reward.average_of > 1 or ensemble_size(plan.config) == 1:
        return []
    return [folder / MODEL for product, folder in needed(plan).items() if product.startswith(PREFIX)]


def baselines(folders: list[Path]) -> list[tuple[str, float]]:
    """The role and the mean score of demonstrations of each of `scoring`, for `Context.members`."""
    summaries = [read_summary(folder.parent) or {} for folder in folders]
    return [(f"reward_{number}", summary["metrics"]["reward/baseline"]) for number, summary in enumerate(summaries, 1)]


def check_members(config: DictConfig, settings: Settings) -> None:
    """Check that the members of an ensemble or of an average can be made, and can be what they are to be.

    Raises:
        ConfigError: they cannot.
    """
    size, average, reward = ensemble_size(config), settings.reward.average_of, settings.reward
    if max(size, average) == 1 or not (config.stage.name == "reward" or needs_reward_model(config)):
        return
    name = f"scorer.members={size}" if size > 1 else f"reward.average_of={average}"
    if size > 1 and average > 1:
        raise ConfigError(f"{name} and reward.average_of={average} both make reward models of it; allowed: one of them")
    if reward.from_:
        raise ConfigError(
            f"{name} trains reward models of different seeds, and reward.from={reward.from_} is one that exists; "
            "allowed: reward.from=null"
        )
    if size > 1 and reward.model:
        raise ConfigError(
            f"{name} needs reward models on the policy's own base, and model@reward.model={reward.model.name} has "
            "another; allowed: null, or reward.average_of, which makes one model of them"
        )
    if size > 1 and reward.lora.r == 0:
        raise ConfigError(
            f"{name}: with lora@reward.lora=none each would be a whole model of its own; allowed: an adapter such as "
            "lora@reward.lora=r16_all, or reward.average_of, which makes one model of them"
        )


def check_margins(config: DictConfig, settings: Settings, source: DataSource, simulated: bool) -> None:
    """Check that comparisons have margins if the reward model's loss asks for them; a data set of the Hub is not read.

    Raises:
        ConfigError: they have none.
    """
    coef, splits = settings.reward.margin_coef, source.splits
    if not coef or not (config.stage.name == "reward" or needs_reward_model(config)):
        return
    remote = data_sets(OmegaConf.to_container(config.data, resolve=True))  # type: ignore[arg-type]
    has = remote or ("preference" in splits and "margin" in source.load("preference").column_names)
    if simulated or not has:
        raise ConfigError(
            f"reward.margin_coef={coef}: the comparisons have no margins, which data=hub reads from scores; allowed: 0"
        )


def _member(plan: Plan, number: int) -> Plan:
    """The plan of a run whose own reward model is this member."""
    config = plan.config.copy()
    with flag_override(config, ["struct", "readonly"], [False, False]):
        OmegaConf.resolve(config)
        config.reward.seed = (config.reward.seed + STRIDE * number) % 2**32
        config.reward.average_of = 1
    return Plan(config, settings_of(config), plan.source, plan.folder, plan.overrides)
