"""The policies of a finished run, and which of them an evaluation has measured."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.errors import ModelError
from rlhf.files import (
    ALPACA_EVAL,
    ALPACA_EVAL_REFERENCE,
    BEST_MODEL,
    CHECKSUMS,
    EVALUATIONS,
    KEPT,
    LINE_FILES,
    METRICS,
    MODEL,
    SUMMARY,
    aside,
    keep_lines,
    read_lines,
    write_lines,
)
from rlhf.files.checksums import damage, damaged_below
from rlhf.models.loading import load_tokenizer
from rlhf.pipeline import cache, earlier, identity, members
from rlhf.pipeline.checkpoints import StepCheckpoints
from rlhf.pipeline.kept_policies import kept_policies
from rlhf.pipeline.plan import IGNORED_GROUPS, Plan
from rlhf.policy_settings import METHODS
from rlhf.tracking import evaluations, sessions
from rlhf.tracking.metrics_file import evaluated_at, evaluated_steps
from rlhf.tracking.reading import renamed_config
from rlhf.tracking.summary import read_summary

log = logging.getLogger(__name__)


def noted(plan: Plan) -> dict[str, Any]:
    """What the summary of a run says of its reward models, and of the files that it has read.

    The files are as they were when the run began or was continued.
    """
    return {**members.noted(plan), "files": earlier.read_note(plan.folder).get("files", {})}


def files_of(plan: Plan) -> dict[str, Any]:
    """The content of the files that the configuration names and that decide the run or its evaluation."""
    ignored = {*IGNORED_GROUPS, "policy", *identity.idle(plan.stage)}
    return identity.contents(
        {key: value for key, value in plan.plain.items() if key not in ignored}, plan.outputs / "cache" / "digests"
    )


def begin(plan: Plan) -> None:
    """Note whose folder this is and how the run is measured, before it begins or continues.

    If an unfinished run was measured otherwise so far, those evaluations move aside: the training goes on, and two
    judges never mix in one file.
    """
    if plan.stage in METHODS:
        _reopen(plan)
    before = earlier.read_note(plan.folder)
    if plan.stage in METHODS and {"judge", "evaluation", "data", "scorer"} <= (before.get("config") or {}).keys():
        measured = before.get("evaluation") or plan.evaluation_of(renamed_config(before["config"]))
        if measured != plan.evaluation:
            set_aside(plan.folder, measured)
    more = {"evaluation": plan.evaluation, "files": files_of(plan)}
    earlier.note(plan.folder, plan.identity, plan.plain, plan.overrides, **more)


def _reopen(plan: Plan) -> None:
    """Make a run that was finished once, and whose summary is gone, ready to be finished again.

    Without a checkpoint it is trained from the start, so that what it was moves aside as a whole. With one, no kept
    policy is trained again, so that the damaged ones move to `damaged/`, or they would be sealed as if they were sound.
    """
    folder, sealed = plan.folder, (plan.folder / CHECKSUMS).exists()
    if not (sealed or (folder / EVALUATIONS).is_dir()):
        return
    if StepCheckpoints(folder / "checkpoints", 1).latest() is None:
        if plan.config.resume != "must":  # which ends here without a checkpoint
            earlier.settle(folder, plan.noted, plan.outputs, True, plan.present)
        return
    for step in sorted({Path(name).parts[1] for name in damaged_below(folder, KEPT)}):
        cache.move_damaged(folder / KEPT / step, folder / "damaged", "resume=never would train it again")
    (folder / CHECKSUMS).unlink(missing_ok=True)  # what is trained from here on gets its own


def last_step(summary: Mapping[str, Any]) -> int:
    """The step after which the training of a policy ended: all `steps` of its method, or fewer at a plateau."""
    plateau, stage = summary.get("plateau") or {}, summary.get("stage")
    method = stage if stage in METHODS else "ppo"
    return int(plateau.get("step", summary["config"][method]["steps"]))


def warn_of_what_is_missing(plan: Plan, run: Path) -> None:
    """Warn where the configuration asks a finished run for evaluations that it has not made, or policies not kept."""
    if plan.stage not in METHODS:
        return
    own, summary = plan.settings.method(plan.stage), read_summary(run) or {}
    asked = {step for step in range(1, last_step(summary)) if own.evaluates(step)}
    lacking = {"eval_every": ("an evaluation at", asked - evaluated_steps(run))}
    if own.keep_evaluated:
        lacking["keep_evaluated"] = ("its policy of", asked - kept_policies(run).keys())
    for key, (what, steps) in lacking.items():
        if steps:
            log.warning(
                "%s.%s: %s is finished, without %s step %s; resume=never trains it again",
                plan.stage, key, run, what, ", ".join(map(str, sorted(steps))),
            )  # fmt: skip


def policies(run: Path, summary: Mapping[str, Any], steps: str) -> dict[int, Path | None]:
    """The policies that a finished run has left: step → the folder of its weights, None for the SFT model.

    `steps` is `last` for the last one alone.
    """
    last = last_step(summary)
    if steps == "last":
        return {last: run / MODEL}
    best = summary.get("best") or {}
    found = {best["step"]: run / BEST_MODEL} if best.get("model") == BEST_MODEL else {}
    return dict(sorted({0: None, **kept_policies(run), **found, last: run / MODEL}.items()))


def take_over(plan: Plan, found: Path) -> None:
    """Make the plan's folder the same finished run as `found`, with the evaluations that are there.

    An unfinished copy of the run in the plan's folder moves aside, so that no file of it is taken for one of `found`.

    Raises:
        ModelError: the models of `found` are damaged.
    """
    cache.check_whole(found)
    earlier.settle(plan.folder, plan.noted, plan.outputs, True, plan.present)
    made = read_summary(found)
    assert made is not None
    more = {"identity": plan.identity}
    if plan.stage in METHODS:
        more["evaluation"] = own_evaluation(plan, made)
    cache.take_over(found, plan.folder, plan.plain, plan.overrides, **more)
    evaluations.rename_run(plan.folder, made.get("identity"), plan.identity)


def own_evaluation(plan: Plan, summary: Mapping[str, Any]) -> str:
    """The digest of the evaluation that was made during the training; earlier versions did not record it."""
    return str(summary.get("evaluation") or plan.evaluation_of(renamed_config(summary["config"])))


def unmeasured(plan: Plan, run: Path) -> dict[int, Path | None]:
    """The policies of a finished run that the evaluation of `plan` has not measured yet, as of `policies`."""
    summary = read_summary(run)
    if plan.stage not in METHODS or summary is None or own_evaluation(plan, summary) == plan.evaluation:
        return {}
    folder = evaluations.place(run, plan.evaluation)
    found = policies(run, summary, plan.settings.evaluation.steps)
    return missing_in(folder, found)


def missing_in(folder: Path, wanted: Mapping[int, Path | None]) -> dict[int, Path | None]:
    """Which of the policies `wanted` (as of `policies`) have to be measured so that `folder` has the results of all.

    If all are measured, but a kill came before the summary was written, the last one is measured again. Results of
    another run do not count.
    """
    if evaluations.foreign(folder):
        return dict(wanted)
    measured = evaluated_steps(folder)
    missing = {step: model for step, model in wanted.items() if step not in measured}
    return missing if missing or (folder / SUMMARY).exists() else {max(wanted): wanted[max(wanted)]}


def has_later(folder: Path, step: int) -> bool:
    """Whether a later step than `step` is measured in `folder`, whose exported answers are those of the last one."""
    return any(measured > step for measured in evaluated_steps(folder))


def check_sound(run: Path, place: Path) -> None:
    """Check the weights of a finished run before they are measured, and that the results go elsewhere, to `place`.

    Raises:
        ModelError: they are damaged.
        ValueError: `place` is the run itself, whose summary and metrics are those of its training.
    """
    if place.resolve() == run.resolve():
        raise ValueError(f"{place} has the results of the training; allowed: a folder in its {EVALUATIONS}")
    wrong = damage(run)
    if wrong:
        raise ModelError(
            f"{run} is damaged: {wrong}; with its {SUMMARY} moved away, its own command makes it whole again"
        )


def tokenizer_of(plan: Plan) -> PreTrainedTokenizerBase:
    """The tokenizer of the policy; that of a finished run is its own, even if it is measured on other data.

    Raises:
        ModelError: it cannot be loaded.
    """
    model = plan.settings.model
    if plan.made_from is not None:
        own = str(plan.made_from["sft"] / MODEL)
        model = replace(model, name_or_path=own, tokenizer=None, gguf_file=None)
    return load_tokenizer(model, plan.source)


def evaluation_results(plan: Plan, folder: Path) -> dict[str, Any]:
    """What an evaluation in `folder` has found: `metrics` of the last policy, `sft_metrics`, and those of the best.

    `identity` is that of the run which was measured.

    The best is the one that the training chose by its own evaluation, so that these figures of it do not flatter.
    """
    run = read_summary(plan.folder) or {}
    best = dict(run.get("best") or {})
    if best:
        measured = evaluated_at(folder, best["step"])
        best |= {"metrics": measured, "chosen_by": own_evaluation(plan, run)}
    found = {"metrics": evaluated_at(folder, last_step(run)), "sft_metrics": evaluated_at(folder, 0)}
    return {**found, "best": best or None, "identity": run.get("identity"), "files": files_of(plan)}


def make_ready(folder: Path) -> None:
    """Drop the lines of evaluations that were interrupted before their metrics were written; create the folder.

    An evaluation of another run moves out of it.
    """
    evaluations.make_room(folder)
    folder.mkdir(parents=True, exist_ok=True)
    complete = evaluated_steps(folder)
    for name in LINE_FILES:
        if (folder / name).exists():
            keep_lines(folder / name, lambda line: line["step"] in complete, "step")


def set_aside(run: Path, digest: str) -> None:
    """Move the evaluations of an unfinished run to `evaluations/<digest>/`, as it will be measured by another one.

    Each file is first completed there and then shortened here, so that after a kill the next start goes on.
    """
    for name, lines in _add_lines(run, evaluations.place(run, digest)).items():
        if (run / name).exists():
            keep_lines(run / name, partial(_stays, lines), "step")


def copy_aside(run: Path, digest: str) -> None:
    """Copy the evaluations that a training made to `evaluations/<digest>/`, which gets those of more steps."""
    target = evaluations.place(run, digest)
    evaluations.make_room(target)
    _add_lines(run, target)
    for name in (ALPACA_EVAL, ALPACA_EVAL_REFERENCE):
        if (run / name).exists() and not (target / name).exists():
            with aside(target / name) as temporary:
                shutil.copyfile(run / name, temporary)


def _add_lines(run: Path, target: Path) -> dict[str, list[dict[str, Any]]]:
    """Add the lines of a run's evaluations to the files in `target`; returns them by the name of their file."""
    target.mkdir(parents=True, exist_ok=True)
    sessions.copy(run, target)
    added = {}
    for name in LINE_FILES:
        found = [line for line in read_lines(run / name, "step") if name != METRICS or "time/evaluate" in line]
        there = read_lines(target / name, "step")
        lines = there + [line for line in found if line not in there]
        write_lines(target / name, lines)
        added[name] = found
    return added


def _stays(moved: Sequence[dict[str, Any]], line: dict[str, Any]) -> bool:
    return line not in moved
