"""What training a policy takes, by method: its models, its stage and its rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.data.records import skipped_rows, train_and_held_out
from rlhf.data.saved_preferences import SavedPreferences
from rlhf.distributed import collectives
from rlhf.models.assembly import policy_roles, ppo_roles
from rlhf.models.roles import Roles
from rlhf.models.tokenizing import encode, short_enough
from rlhf.pipeline.config import instantiate
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.rendered import show_rendered
from rlhf.stages.best_of_n import BestOfN, ExpertIteration
from rlhf.stages.cutting import count_short, distinct
from rlhf.stages.dpo import DPO
from rlhf.stages.evaluation import Evaluator, PolicyEvaluation, Scorer
from rlhf.stages.ppo import make_ppo

Rows = tuple[list[Any], dict[str, Any]]  # what is trained on, and what the summary says about it
BESIDE_PPO = {"dpo": DPO, "best_of_n": BestOfN, "expert_iteration": ExpertIteration}


def load_roles(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, sft: Path, reward: Path | None, members: Sequence[Path]
) -> Roles:
    """The models of the plan's stage, all given as folders.

    `reward` is a reward model that is a role, and `members` are further ones beside it.
    """
    settings, quantization = plan.settings, plan.quantization
    if plan.stage in BESIDE_PPO:
        return policy_roles(settings, tokenizer, sft, reward, quantization, members)
    beside = instantiate(plan.config.reference, "reference").role
    only_judges = not plan.learns_from_reward_model
    return ppo_roles(settings, tokenizer, sft, reward, quantization, only_judges, beside, members)


def make_stage(
    plan: Plan,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    evaluator: Evaluator,
    samples: Path,
) -> PolicyEvaluation:
    """The plan's stage; that of PPO for stage=evaluate."""
    if plan.stage in BESIDE_PPO:
        return BESIDE_PPO[plan.stage](plan.settings, roles, tokenizer, scorer, evaluator, samples)
    kl = instantiate(plan.config.kl, "kl")
    rule = instantiate(plan.config.reference, "reference")
    return make_ppo(plan.settings, roles, tokenizer, scorer, kl, evaluator, samples, rule)


def training_rows(plan: Plan, stage: PolicyEvaluation) -> Rows:
    """What the stage trains on, the first row of which is shown as the model reads it; a DPO stage gets held-out rows.

    Raises:
        DataError: the data set cannot be read, or has too few rows.
    """
    return _comparisons(plan, stage) if isinstance(stage, DPO) else _prompts(plan, stage)


def _prompts(plan: Plan, stage: PolicyEvaluation) -> Rows:
    """The prompts that are short enough."""
    prompts = list(plan.source.load("prompts")["prompt"])
    kept = short_enough(stage.tokenizer, prompts, plan.settings.model.max_prompt_tokens)
    prompts = [prompts[i] for i in kept]
    first = {"prompt": encode(stage.tokenizer, prompts[:1])[0]}
    collectives.on_rank_zero(lambda: show_rendered(plan.folder, plan.stage, stage.tokenizer, first))
    return prompts, {}


def _comparisons(plan: Plan, stage: DPO) -> Rows:
    """The comparisons that the reward model would learn from, without pairs that are equal once they are cut."""
    dpo, tokenizer = stage.dpo, stage.tokenizer
    source: Any = SavedPreferences(plan.preferences_folder) if plan.preferences_folder else plan.source
    limit = f"dpo.max_length={dpo.max_length}"
    train, held_out = train_and_held_out(source, "preference", "preference_validation", dpo.validation_size)
    train, pairs, equal = distinct(train, stage.encode(train), "preference", limit)
    _, stage.held_out, _ = distinct(held_out, stage.encode(held_out), "preference, held out", limit)
    (prompt, chosen), (_, rejected) = pairs[0]
    first = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    collectives.on_rank_zero(lambda: show_rendered(plan.folder, "dpo", tokenizer, first))
    texts = [text for pair in pairs for text in pair]
    cut = count_short(texts, dpo.max_length, tokenizer.eos_token_id, "preference", limit)
    skipped = skipped_rows(source, "preference") | equal
    return pairs, {"rows": {"preference": len(train)}, "skipped": skipped, "cut": cut}
