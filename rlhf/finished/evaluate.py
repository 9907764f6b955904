"""`rlhf stage=evaluate policy=…`: measures any policy by any judge, without a training step.

A finished run that trained a policy is measured as it measured itself, with its reward, its KL from SFT and all
policies that it has kept, and the results lie beside it (`rlhf.tracking.evaluations`). Any other policy
(`rlhf.finished.policies`) answers the evaluation prompts, and its answers are judged. Either way the command's own
folder holds the results, too.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf.data.records import as_records
from rlhf.errors import ConfigError, RunError
from rlhf.files import BEST_MODEL, EARLIER, MODEL, OUTCOME, SUMMARY, read_object, write_json
from rlhf.finished.as_trained import as_trained
from rlhf.finished.outside_evaluation import FINISHED, OutsideEvaluation
from rlhf.finished.run import FinishedRun, located
from rlhf.finished.vocabulary import check_knows
from rlhf.pipeline import cache, earlier, identity, measuring
from rlhf.pipeline.checks import check
from rlhf.pipeline.config import data_source, settings_of
from rlhf.pipeline.members import product_of
from rlhf.pipeline.plan import Plan
from rlhf.pipeline.preflight import settle_budget
from rlhf.pipeline.run import Run
from rlhf.policy_settings import FROM_COMPARISONS, METHODS
from rlhf.tracking import evaluations
from rlhf.tracking.metrics_file import evaluated_at, evaluated_steps
from rlhf.tracking.run_folder import begin
from rlhf.tracking.summary import read_summary

log = logging.getLogger(__name__)


class NotTrainedError(ConfigError):
    """The run that is to be measured has not been trained yet."""


@dataclass(frozen=True)
class RunEvaluation:
    """The measurement of a finished run that trained a policy.

    Attributes:
        run: The run, and which of its policies is meant, if one is chosen.
        plan: Its configuration, measured as the command says; the folder is the run's.
        chosen: The step of the one policy to measure; None for all that `evaluation.steps` asks for.
    """

    run: FinishedRun
    plan: Plan
    chosen: int | None

    @property
    def own(self) -> bool:
        """Whether the training has measured the same, so that the results are in the run's own files."""
        return measuring.own_evaluation(self.plan, self.run.summary) == self.plan.evaluation

    @property
    def place(self) -> Path:
        """The folder of the results: the run's own if the training has measured all of them, else one beside."""
        measured = self.own and self._wanted().keys() <= evaluated_steps(self.run.folder)
        return self.run.folder if measured else evaluations.place(self.run.folder, self.plan.evaluation)

    @property
    def identity(self) -> str:
        """What decides the results."""
        determinants = {"run": self.plan.identity, "evaluation": self.plan.evaluation, "step": self.chosen}
        return identity.digest(determinants)

    def todo(self) -> dict[int, Path | None]:
        """The policies that are not measured yet: step → folder of its weights, None for the SFT model."""
        place, wanted = self.place, self._wanted()
        if self.own and place != self.run.folder:  # what the training has measured is copied there
            measured = evaluated_steps(self.run.folder)
            wanted = {step: model for step, model in wanted.items() if step not in measured}
        return measuring.missing_in(place, wanted)

    def results(self) -> dict[str, Any]:
        """The summary of the results; measures what is missing."""
        todo, place = self.todo(), self.place
        if todo:
            settle_budget(self.plan)
            log.info("measured without training, at step %s: %s", ", ".join(map(str, todo)), place)
            if self.own:
                measuring.copy_aside(self.run.folder, self.plan.evaluation)
            Run(self.plan, progress=False).measure(todo, place)
        evaluations.show(self.run.folder, self.plan.evaluation)
        found = read_object(place / SUMMARY, metrics=dict)
        return found if self.chosen is None else {**found, "metrics": evaluated_at(place, self.chosen)}

    def _wanted(self) -> dict[int, Path | None]:
        """All policies whose results are asked for, as of `todo`."""
        steps = self.plan.settings.evaluation.steps if self.chosen is None else "all"
        found = measuring.policies(self.run.folder, self.run.summary, steps)
        return {step: model for step, model in found.items() if self.chosen in (None, step)}


def evaluate(config: DictConfig, folder: Path, given: Sequence[str], overrides: list[str]) -> dict[str, Any]:
    """Measure the policy that `config.policy` names; returns the summary that the command's `folder` gets.

    `given` are the overrides of the command line, and `overrides` those that distinguish it from others of its sweep.
    In a dry run nothing is done, and the description of what would be is returned.

    Raises:
        UserError: the policy cannot be opened, or cannot be measured so.
    """
    try:
        subject = open_subject(config, folder, given)
    except NotTrainedError as error:
        if not config.dry_run:
            raise
        return _described(None, folder, str(error))
    if config.dry_run:
        return _described(subject, folder)
    if subject.plan.folder.resolve() == folder.resolve() and isinstance(subject, RunEvaluation):
        subject.results()  # the command's folder is the run's own
        return evaluations.shown_summary(folder) or {}
    described = f"the results of {earlier.describe(folder, subject.plan.plain)}"
    earlier.settle(folder, subject.identity, subject.plan.outputs, config.resume == "never", described)
    if (read_summary(folder) or {}).get("identity") != subject.identity:
        begin(folder, config)
    earlier.note(folder, subject.identity, subject.plan.plain, overrides, evaluation=subject.plan.evaluation)
    results = _results(subject)
    if subject.place != folder:
        for name in OUTCOME:
            if (subject.place / name).exists():
                shutil.copyfile(subject.place / name, folder / name)
        results["same_as"] = os.path.relpath(subject.place, folder)
    shown = {key: OmegaConf.to_container(config)[key] for key in ("name", "output_dir", "report")}  # type: ignore[index, call-overload]
    plain = {**subject.plan.plain, **shown, "policy": str(config.policy)}
    summary = {**results, "stage": "evaluate", "identity": subject.identity, "config": plain, "overrides": overrides}
    write_json(folder / SUMMARY, summary)
    return summary


def _results(subject: RunEvaluation | OutsideEvaluation) -> dict[str, Any]:
    """The results of a measurement. Those of a run lie in its folder, whose lock is held while any is missing.

    Raises:
        RunError: while another process held it, the run moved aside and another one came into the folder.
    """
    if isinstance(subject, OutsideEvaluation) or not subject.todo():
        return subject.results()
    run = subject.run
    with cache.locked(run.folder / ".lock", f"another process works in {run.folder}"):
        if (read_summary(run.folder) or {}).get("identity") != run.summary.get("identity"):
            raise RunError(
                f"{run.folder} no longer holds the run that was to be measured, as another process worked in it; "
                f"allowed: its present place, such as one in {run.folder / EARLIER}"
            )
        return subject.results()


def open_subject(config: DictConfig, folder: Path, given: Sequence[str]) -> RunEvaluation | OutsideEvaluation:
    """What `config.policy` names, with all checks that need no model."""
    word = str(config.policy)
    if word == FINISHED or word.startswith(f"{FINISHED}@"):
        return _of_configuration(config, folder)
    path = Path(word).expanduser()
    found = located(path)
    if found and read_object(found[0] / SUMMARY, stage=str)["stage"] in METHODS:
        run = FinishedRun.open(*found)
        return _subject(as_trained(config, run, given), run, None if found[0] == path else _step_of(run))
    return OutsideEvaluation.named(config, folder)


def _of_configuration(config: DictConfig, folder: Path) -> RunEvaluation:
    """The finished run of the command's own configuration, under any name, by any method or by the one after an @.

    Raises:
        NotTrainedError: there is none.
        ConfigError: there is no such method, or there are runs of several.
    """
    word, found, source = str(config.policy), {}, data_source(config)
    methods = word.partition("@")[2].split() or METHODS
    chosen = ", ".join(f"{FINISHED}@{method}" for method in METHODS)
    if not set(methods) <= set(METHODS):
        raise ConfigError(f"policy={word}: there is no such method; allowed: {FINISHED}, {chosen}")
    for method in methods:
        trained = config.copy()
        trained.stage, trained.policy = {"name": method}, None
        place = Plan(trained, settings_of(trained), source, folder).finished()
        if place is not None:
            found[method] = _subject(trained, FinishedRun.open(place), None)
    if len(found) > 1:
        raise ConfigError(
            f"policy={word}: of this configuration there are finished runs of {' and '.join(found)}; allowed: "
            f"{', '.join(f'{FINISHED}@{method}' for method in found)}, or the folder of a run"
        )
    if not found:
        raise NotTrainedError(
            f"policy={word}: {config.output_dir} holds no finished run of this configuration; allowed: the "
            f"configuration of one, the folder of a run, or stage={' or '.join(methods)}, which trains it"
        )
    return next(iter(found.values()))


def _subject(config: DictConfig, run: FinishedRun, chosen: int | None) -> RunEvaluation:
    """The measurement of a run by `config`, from the models that it was made from, whatever code made them.

    Raises:
        ConfigError: the configuration asks for a reward model, and the run has none.
        RunError: a model that the run started from is gone.
    """
    settings, source = settings_of(config), data_source(config)
    # what it took is in the cache, whether or not it still lies where it came from
    sft = replace(settings.sft, from_=None, difference_to=None)
    settings = replace(settings, sft=sft, reward=replace(settings.reward, from_=None, difference_to=None))
    checked = config.copy()
    if run.summary.get("reward_model"):
        checked.reward["from"] = run.summary["reward_model"]  # so that the data need no comparisons to train one on
    if run.stage in FROM_COMPARISONS:
        checked.stage = {"name": "evaluate"}  # nor to train the policy on
    check(checked, settings, source)
    if not settings.evaluation.factscore:
        prompts = as_records(source.load("eval"), "eval")[: settings.evaluation.prompts]
        check_knows(f"policy={run.folder}", run.tokenizer(), [row.prompt for row in prompts])
    plan = Plan(config, settings, source, run.folder)
    plan.beside, plan.reward_reads = None, run.reward_reads
    plan.identity, plan.preferences_folder = str(run.summary.get("identity")), None
    plan.trained_scorer = run.config["scorer"]
    plan.sft_folder = run.sft.folder
    plan.made_from = {"sft": plan.sft_folder}
    if plan.needs_reward_model:
        model = run.reward
        if model is None:
            raise ConfigError(
                f"judge or scorer needs the reward model of {run.folder}, which was trained without one; allowed: "
                "judge=finished_reward_model with the folder of one, or another judge"
            )
        plan.reward_folder = plan.made_from["reward"] = model.folder
        plan.made_from |= {product_of(number): member.folder for number, member in enumerate(run.members, 1)}
    gone = [path for path in plan.made_from.values() if cache.missing(path)]
    if gone:
        raise RunError(f"{gone[0]}, which {run.folder} started from, is missing or damaged; its own command builds it")
    return RunEvaluation(run, plan, chosen)


def _step_of(run: FinishedRun) -> int:
    """The step of the policy that is meant by `RUN/model`, `RUN/model_best` or `RUN/kept/step-000020`."""
    if run.chosen == MODEL:
        return measuring.last_step({**run.summary, "config": run.config})
    if run.chosen == BEST_MODEL:
        return int(run.summary["best"]["step"])
    return int(run.chosen.rpartition("step-")[2])


def _described(
    subject: RunEvaluation | OutsideEvaluation | None, folder: Path, waits_for: str | None = None
) -> dict[str, Any]:
    """What would be measured, in the form of `rlhf.pipeline.preflight.describe`; or what has to be there before."""
    todo = list(subject.todo()) if subject else []
    return {
        "folder": str(folder), "stage": "evaluate", "cached": {}, "done": not todo and not waits_for, "measures": todo,
        "same_as": None, "moves_aside": None, "step": 0, "memory": None, "waits_for": waits_for,
        "results": str(subject.place) if subject else None,
    }  # fmt: skip
