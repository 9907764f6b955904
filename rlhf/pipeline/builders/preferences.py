"""Comparisons of the SFT model's own answers, labelled by a judge (`preferences=simulated`)."""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.data.options import parse_template
from rlhf.data.templates import PromptTemplate
from rlhf.distributed import collectives
from rlhf.evaluation.evaluator import Judge
from rlhf.evaluation.preferences import Simulated
from rlhf.files import METRICS, MODEL
from rlhf.models.loading import DTYPES, load_causal_lm, load_tokenizer
from rlhf.models.roles import Roles
from rlhf.models.tokenizing import short_enough
from rlhf.pipeline import cache
from rlhf.pipeline.builders import Site
from rlhf.pipeline.config import instantiate
from rlhf.rollout.factory import make_engine
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.scorers import Context
from rlhf.seeding import generator
from rlhf.tracking.metrics_file import JsonLines
from rlhf.tracking.summary import write_summary

log = logging.getLogger(__name__)


def template_of(plain: dict[str, Any]) -> PromptTemplate | None:
    """What turns an instruction into a prompt, if the data set has a template."""
    template = plain["data"].get("template")
    return parse_template(template) if template else None


def prepare_preferences(site: Site, simulated: Simulated) -> None:
    """Check what can be checked before anything is built.

    Raises:
        ConfigError: the annotator lacks something.
        DataError: there are too few prompts.
    """
    simulated.prepare(site.source, template_of(site.plain))


def build_preferences(site: Site, folder: Path, simulated: Simulated, sft: Path, device: str) -> None:
    """Sample pairs of answers from the SFT model of the folder `sft`, and label them: `preference.jsonl` and held-out.

    The first process does it for all.
    """
    collectives.on_rank_zero(lambda: _build(site, folder, simulated, sft, device))


def _build(site: Site, folder: Path, simulated: Simulated, sft: Path, device: str) -> None:
    started = time.monotonic()
    log.info("simulating preferences (%s)", cache.name_of(folder))
    # 1. The SFT model, which answers.
    tokenizer = load_tokenizer(site.settings.model, site.source)
    base = load_causal_lm(site.settings.model, tokenizer, sft / MODEL, site.quantization)
    roles = Roles(base, DTYPES[site.settings.model.dtype]).eval().to(device)
    generation = replace(site.settings.generation, capture_logprobs="never")
    engine = make_engine(generation, tokenizer, roles)

    def answer(prompts: list[str], part: int) -> Rollouts:
        stream = generator(simulated.settings.seed, "preferences", part, device)
        return rollout(engine, roles, "reference", tokenizer, prompts, generation, stream,
                       simulated.settings.temperature, simulated.settings.max_new_tokens)  # fmt: skip

    # 2. The judge, made only when there are answers to label.
    def make_judge() -> Judge:
        budget = site.settings.reward.microbatch_tokens
        context = Context(site.source, tokenizer, roles, microbatch_tokens=budget, cache=folder.parent)
        return instantiate(simulated.judge, "preferences.judge", context)

    # 3. The prompts that fit.
    limit = site.settings.model.max_prompt_tokens
    questions = {
        split: [rows[i] for i in short_enough(tokenizer, [row.prompt for row in rows], limit)]
        for split, rows in simulated.draw_prompts(site.source, template_of(site.plain)).items()
    }
    metrics = simulated.make(folder, questions, answer, make_judge)
    (folder / METRICS).unlink(missing_ok=True)
    JsonLines(folder).log_metrics(metrics, 0)
    write_summary(folder, metrics, site.plain, started, stage="preferences", sft_model=sft.name)
