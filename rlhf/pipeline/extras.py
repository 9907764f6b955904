"""What a stage gets besides its models: texts that measure its costs, and those that PPO mixes into its updates."""

import functools
import logging
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from rlhf.data.records import DataSource, Demonstration, Prompt, first_records, train_and_held_out
from rlhf.data.texts import check_texts, read_texts
from rlhf.distributed import collectives, processes
from rlhf.errors import ConfigError, DataError
from rlhf.models.sequences import Sequences
from rlhf.models.tokenizing import encode, encode_pairs, encode_texts
from rlhf.pipeline.plan import Plan
from rlhf.rollout.sample import rollout
from rlhf.settings import Settings
from rlhf.stages.costs import Costs
from rlhf.stages.evaluation import PolicyEvaluation
from rlhf.stages.ppo import PPO
from rlhf.stages.pretraining import PretrainingMix

log = logging.getLogger(__name__)


def with_extras(stage: PolicyEvaluation, plan: Plan, prompts: Sequence[Prompt]) -> PolicyEvaluation:
    """Add to a stage what its settings ask for besides; returns the stage. `prompts` are those of the evaluation."""
    stage.costs = costs(stage, plan, prompts)
    if isinstance(stage, PPO) and plan.stage == "ppo" and plan.settings.ppo.ptx_coef:
        stage.mix = pretraining_mix(stage, plan)
    return stage


def check_extras(config: DictConfig, settings: Settings, source: DataSource) -> None:
    """Check that texts can be mixed into the updates as the settings ask for.

    Raises:
        ConfigError: they cannot.
        DataError: the file of texts is missing.
    """
    ppo = settings.ppo
    if settings.evaluation.texts:
        check_texts("evaluation.texts", settings.evaluation.texts)
    if config.stage.name != "ppo":
        return
    name = f"ppo.ptx_coef={ppo.ptx_coef}"
    if not ppo.ptx_coef:
        if ppo.ptx_texts or ppo.ptx_batch_size:
            raise ConfigError(
                f"{name} mixes no texts into the updates, so that ppo.ptx_texts and ppo.ptx_batch_size have no use; "
                "allowed: null for both, or a weight above 0"
            )
        return
    if ppo.accumulation == "as_published":
        raise ConfigError(f"{name}: ppo.accumulation=as_published reproduces updates without other texts; allowed: 0")
    if processes.num_shards(config.trainer) > 1:
        raise ConfigError(
            f"{name}: with trainer=fsdp all processes make as many passes, which their shares of the texts need not "
            "take; allowed: 0, or trainer=ddp"
        )
    if ppo.ptx_texts:
        check_texts("ppo.ptx_texts", ppo.ptx_texts)
    elif "sft" not in source.splits:
        raise ConfigError(
            f"{name} mixes demonstrations into the updates, and the data set has no split sft; allowed: ppo.ptx_texts"
        )


def costs(stage: PolicyEvaluation, plan: Plan, prompts: Sequence[Prompt]) -> Costs:
    """What measures a policy on texts that do not depend on it."""
    settings, tokenizer, source = plan.settings.evaluation, stage.tokenizer, plan.source
    rows = {"demonstration": held_out_demonstrations(plan, settings.demonstrations)}
    if settings.texts:
        rows["text"] = [Demonstration("", text) for text in read_texts("evaluation.texts", settings.texts)]
    limit = plan.settings.sft.max_length
    encoded = {
        name: encode_pairs(tokenizer, [row.prompt for row in found], [row.response for row in found], limit)
        for name, found in rows.items()
        if found
    }
    facts = source.probes() if hasattr(source, "probes") else []
    asked = encode(tokenizer, [prompt for prompt, _, _ in facts])
    begun, told = (encode_texts(tokenizer, [fact[part] for fact in facts]) for part in (1, 2))
    probes = [(prompt + start, end) for prompt, start, end in zip(asked, begun, told, strict=True)]
    return Costs(encoded, probes, reference_answers(stage, [row.prompt for row in prompts[: settings.kl_prompts]]))


def held_out_demonstrations(plan: Plan, count: int) -> list[Demonstration]:
    """The first so many demonstrations that SFT holds out; fewer, or none, if the data set has fewer."""
    source, size = plan.source, plan.settings.sft.validation_size
    try:
        if "sft_validation" in source.splits:
            rows = source.load("sft_validation") if count else None
        else:
            rows = source.load("sft").shuffle(seed=0) if count and "sft" in source.splits else None
            rows = rows.select(range(len(rows) - size, len(rows))) if rows and len(rows) > size else None
    except DataError as error:
        log.warning("the perplexity of held-out demonstrations is not measured: %s", error)
        rows = None
    return first_records(rows, "sft", count) if rows else []


def reference_answers(stage: PolicyEvaluation, prompts: Sequence[str]) -> Callable[[], Sequences | None]:
    """Answers of the reference to these prompts, which are sampled once: this process's share, None if it has none."""
    size, settings = stage.config.generation.batch_size, stage.config.generation

    @functools.cache
    def answers() -> Sequences | None:
        asked, given = [], []
        for index in range(collectives.rank(), -(-len(prompts) // size), collectives.size()):
            part, stream = list(prompts[index * size : (index + 1) * size]), stage.stream("forward KL", index)
            sampled = rollout(stage.engine, stage.roles, "reference", stage.tokenizer, part, settings, stream)
            asked += encode(stage.tokenizer, part)
            given += sampled.sequences.responses()
        return Sequences.from_lists(asked, given) if asked else None

    return answers


def pretraining_mix(stage: PPO, plan: Plan) -> PretrainingMix:
    """The texts of `ppo.ptx_texts`, or the demonstrations that the SFT model may have learnt from; none held out."""
    settings, ppo = plan.settings, plan.settings.ppo
    if ppo.ptx_texts:
        rows = [Demonstration("", text) for text in read_texts("ppo.ptx_texts", ppo.ptx_texts)]
    else:
        rows, _ = train_and_held_out(plan.source, "sft", "sft_validation", settings.sft.validation_size)
    prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
    encoded = encode_pairs(stage.tokenizer, prompts, responses, settings.sft.max_length)
    updates = ppo.epochs * (ppo.rollout_batch_size // ppo.minibatch_size)
    size = ppo.ptx_batch_size or ppo.minibatch_size
    return PretrainingMix(encoded, ppo.ptx_coef, size, ppo.microbatch_tokens, settings.seed, updates)
