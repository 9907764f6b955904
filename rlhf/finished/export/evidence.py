"""What a model card shows of a run's evaluation: metrics with intervals, and samples by a fixed rule."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rlhf.files import ALPACA_EVAL
from rlhf.finished.run import FinishedRun
from rlhf.report.comparisons import judged
from rlhf.report.metric_info import metric_info
from rlhf.report.recorded_run import RecordedRun
from rlhf.report.rows import per_prompt
from rlhf.report.statistics import mean_of
from rlhf.report.tables import Number, WithInterval
from rlhf.tracking.sessions import differences

SHOWN = {"reward/accuracy", "reward/longer_accuracy", "reward/margin", "reward/validation_loss", "reward/baseline",
         "sft/validation_loss", "sft/perplexity"}  # fmt: skip
DERIVED = ("_se", "_fall")  # standard errors, and falls below the best evaluation
SAMPLES = 3


class Result(NamedTuple):
    """A metric of the model and, as text with its interval, that of the SFT model ("" if unknown)."""

    metric: str
    title: str
    value: float
    text: str
    before: str


def results(run: FinishedRun) -> Iterator[Result]:
    """Yield every finite metric of the model's quality.

    Where the run recorded it for every instruction, it has its 95 % interval over these.
    """
    recorded, sft = _recorded(run), run.summary.get("sft_metrics") or {}
    last, first = max(recorded.outcomes, default=0), min(recorded.outcomes, default=0)
    for metric, value in run.metrics.items():
        measured = (metric.startswith("eval/") and not metric.endswith(DERIVED)) or metric in SHOWN
        if not (measured and isinstance(value, int | float) and math.isfinite(value)):
            continue
        before = sft.get(metric)
        start = ""
        if first == 0 and isinstance(before, int | float) and math.isfinite(before):
            start = _text(metric, float(before), recorded.outcomes.get(0, {}))
        text = _text(metric, float(value), recorded.outcomes.get(last, {}))
        yield Result(metric, metric_info(metric).title, float(value), text, start)


def samples(run: FinishedRun) -> list[dict[str, str]]:
    """The answers to the first instructions of the last evaluation, and those of the SFT model: prompt, sft, answer."""
    found = []
    for prompt, steps in list(_recorded(run).samples.items())[:SAMPLES]:
        texts = {step: str(line.get("response", "")) for step, line in steps.items()}
        found.append({"prompt": prompt, "sft": texts.get(0, ""), "answer": texts[max(texts)]})
    return found


def bare_format(run: FinishedRun) -> str | None:
    """The prompts of data without a template, with `{instruction}` in the place of the instruction.

    None if the run recorded no evaluation that shows it.
    """
    exported = run.folder / ALPACA_EVAL
    prompt = next(iter(_recorded(run).samples), None)
    if prompt is None or not exported.exists():
        return None
    first = json.loads(exported.read_text(encoding="utf-8"))[0]["instruction"]
    before, found, after = prompt.partition(first)
    return f"{before}{{instruction}}{after}" if found and first else None


def found_by_guards(run: FinishedRun) -> list[str]:
    """What guards found in the training, a sentence each."""
    found = run.summary.get("guards") or {}
    return [f"{name} (from step {each['first_step']} on): {each['message']}" for name, each in found.items()]


def continued(run: FinishedRun) -> list[str]:
    """How its training was continued in another environment than before, if it was: `from step 4 on with …`."""
    return [
        f"from step {now['from_step']} on with {', '.join(differences(before, now))}"
        for before, now in pairwise(run.summary.get("sessions") or [])
    ]


def _recorded(run: FinishedRun) -> RecordedRun:
    """The files of the run's evaluations."""
    return RecordedRun(run.folder, (), "finished", summary=run.summary)


def _text(metric: str, value: float, outcomes: dict[str, Any]) -> str:
    """A metric in display units, with its interval if it is known for every instruction."""
    info, each = metric_info(metric), per_prompt(outcomes, metric)
    kept = None if each is None else judged(np.asarray(each, float)[None])[0]
    if kept is None or kept.shape[1] < 2:
        return str(Number(info.scale * value, digits=info.digits))
    mean = mean_of(kept)
    return str(WithInterval(info.scale * value, info.scale * mean.low, info.scale * mean.high, info.digits))
