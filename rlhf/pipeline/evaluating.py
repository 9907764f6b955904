"""What measures a policy: the prompts of the evaluation, the judge, the gold score, and the metric of the best."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from rlhf.data.records import DataSource, Prompt, as_records
from rlhf.data.templates import PromptTemplate, Template
from rlhf.errors import ConfigError
from rlhf.evaluation import alpaca_eval
from rlhf.evaluation.difficulty import load_difficulties
from rlhf.evaluation.diversity import diversity
from rlhf.evaluation.evaluator import ResponseEvaluator, evaluation_metrics
from rlhf.evaluation.factscore import FactScore
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.pipeline.builders.preferences import template_of
from rlhf.pipeline.config import instantiate, target_class
from rlhf.pipeline.plan import Plan
from rlhf.policy_settings import METHODS
from rlhf.scorers import Context
from rlhf.settings import EvaluationSettings, Settings


def make_evaluator(plan: Plan, context: Context, folder: Path | None) -> tuple[ResponseEvaluator, DataLoader]:
    """What turns answers into metrics, and the prompts to answer; the answers are exported to `folder`, if any."""
    settings = plan.settings.evaluation
    # 1. The evaluation set: the data set's own, or for FActScore a prompt about each entity.
    node = plan.config.evaluation.get("factscore")
    factscore: FactScore | None = instantiate(node, "evaluation.factscore", context.cache) if node else None
    held_out = factscore.prompts(question_template(plan)) if factscore else as_records(plan.source.load("eval"), "eval")
    # 2. What judges the answers.
    known = None
    if settings.difficulty:
        instructions = [instruction_or_prompt(row) for row in held_out]
        known = load_difficulties(settings.difficulty, instructions, settings.prompts)
    judge, node = instantiate(plan.config.judge, "judge", context), plan.config.evaluation.get("gold")
    gold = instantiate(node, "evaluation.gold", context) if node else None

    def export(prompts: Sequence[Prompt], responses: Sequence[str]) -> None:
        """Write the answers in AlpacaEval's format, to be judged elsewhere too."""
        if folder is None:
            return
        dataset = str(plan.plain["data"]["_target_"]).rpartition(".")[2].lower()
        name = f"{plan.plain['name']}/{plan.folder.name}"
        alpaca_eval.export(folder, prompts, responses, name, dataset)

    evaluator = ResponseEvaluator(plan.source, judge, export, factscore, known, gold)
    prompts = held_out[: settings.prompts]
    return evaluator, DataLoader(prompts, batch_size=plan.settings.generation.batch_size, collate_fn=list)  # type: ignore[arg-type]


def question_template(plan: Plan) -> PromptTemplate | None:
    """The template of the data; of data without one, such as the farm, what its prompts have around the instruction."""
    template = template_of(plan.plain)
    if template is not None or "eval" not in plan.source.splits:
        return template
    row = Prompt(**plan.source.load("eval")[0])
    before, found, after = row.prompt.partition(row.instruction or row.prompt)
    if not found or not before + after:
        return None
    start, end = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    return Template(f"{start}{{instruction}}\n\n{{input}}{end}", f"{start}{{instruction}}{end}")


def reads_words(config: DictConfig) -> bool:
    """Whether the judge has a vocabulary of its own, which may lack the words of the data."""
    return hasattr(target_class(config.judge, "judge"), "check_reads")


def check_judge_reads(config: DictConfig, texts: Sequence[str]) -> None:
    """Check that the judge knows the words of texts such as it will read, if it has a vocabulary.

    Raises:
        ConfigError: it does not.
    """
    if reads_words(config):
        target_class(config.judge, "judge").check_reads(OmegaConf.to_container(config.judge, resolve=True), texts)


def ping(config: DictConfig) -> None:
    """Check that the judge's endpoint responds.

    Raises:
        ConfigError: it cannot be reached.
    """
    scored = config.evaluation.get("factscore")
    node, key = (scored, "evaluation.factscore") if scored else (config.judge, "judge")
    target = target_class(node, key)
    if hasattr(target, "ping"):
        target.ping(OmegaConf.to_container(node, resolve=True))


def logged_metrics(settings: EvaluationSettings, source: DataSource, judged: bool) -> list[str]:
    """The names of all metrics that evaluations log, but for standard errors and falls below the best one.

    Some need what only the training shows: `eval/facts_lost` that the SFT model knows any of the facts, and the
    perplexity of demonstrations that some are held out.
    """
    factscore, difficulty = bool(settings.factscore), bool(settings.difficulty)
    names = evaluation_metrics(source, judged, factscore, difficulty, bool(settings.gold))
    names += ["eval/entropy", "eval/forward_kl"]
    if settings.demonstrations and {"sft", "sft_validation"} & set(source.splits):
        names += ["eval/demonstration_perplexity"]
    names += ["eval/text_perplexity"] if settings.texts else []
    names += ["eval/facts_known", "eval/facts_lost"] if hasattr(source, "probes") else []
    return names + (list(diversity([[[0]]], 1)) if settings.diversity_samples else [])


def best_metric(config: DictConfig, settings: Settings, source: DataSource) -> str | None:
    """The metric by which `keep_best` of the method chooses a checkpoint; None if only the latest ones are to be kept.

    Raises:
        ConfigError: the evaluations of this configuration do not log that metric.
    """
    chosen = settings.method(config.stage.name).keep_best
    judged = getattr(target_class(config.judge, "judge"), "compares", True)
    allowed = logged_metrics(settings.evaluation, source, judged)
    if chosen == "auto":
        return next((name for name in ("eval/factscore", "eval/win_rate") if name in allowed), None)
    if chosen is not None and chosen not in allowed:
        method = config.stage.name if config.stage.name in METHODS else "ppo"
        raise ConfigError(f"{method}.keep_best={chosen} is not allowed; allowed: auto, null, {', '.join(allowed)}")
    return chosen
