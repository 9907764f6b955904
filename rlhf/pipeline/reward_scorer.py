"""A reward model that is no role beside the policy, as a scorer of texts."""

from transformers import AutoTokenizer

from rlhf.errors import explained
from rlhf.files import MODEL
from rlhf.models.assembly import reward_alone
from rlhf.models.released import find
from rlhf.models.tokenizing import keep_template
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.taken import CLASSIFIER, IDS
from rlhf.scorers import Context, TextScorer
from rlhf.scorers.classifier import ClassifierScorer
from rlhf.scorers.separate import SeparateRewardModel


def reward_scorer(context: Context, plan: Plan) -> TextScorer | None:
    """The run's reward model on the device of the policy, if it is no role: one of ours, or anybody's classifier.

    Raises:
        ModelError: it cannot be loaded.
    """
    if plan.reward_reads == IDS:
        return None
    folder, max_length = plan.reward_folder / MODEL, plan.settings.reward.max_length
    if plan.reward_reads == CLASSIFIER:
        return ClassifierScorer(
            context, str(folder), label=None, max_length=max_length, template=plan.settings.reward.template
        )
    model, base = plan.settings.reward.model or plan.settings.model, find("reward.from", str(folder)).base
    with explained(f"{folder}: no tokenizer could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    roles = reward_alone(model, tokenizer, folder, base and base.folder, plan.quantization).to(context.roles.device)
    return SeparateRewardModel(context, roles, keep_template(tokenizer, context.source), max_length)
