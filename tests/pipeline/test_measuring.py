"""Finished runs that are measured again: by another judge, on other instructions, at other steps, without training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import Interrupted
from rlhf.files import ALPACA_EVAL, EVALUATIONS, KEPT, METRICS, MODEL, SUMMARY, read_json, read_lines, write_json
from rlhf.files.digests import sha256
from rlhf.pipeline import earlier, identity, run
from rlhf.pipeline.measuring import check_sound
from rlhf.pipeline.plan import IGNORED_GROUPS
from rlhf.report.cli import main as report
from rlhf.stages.ppo import PPO
from rlhf.tracking import evaluations
from rlhf.tracking.metrics_file import evaluated_at, read_metrics
from tests.helpers.command_line import TINY, error_sentence, run_in_process, two_threads
from tests.helpers.composed_config import composed_plan
from tests.helpers.run_results import without_times

pytestmark = pytest.mark.slow
ARGUMENTS = [*TINY, "logger=csv", "ppo.eval_every=2", "ppo.lr=0.05"]
OTHER = "judge=reward_model"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run `outputs/first/run`, judged by gold at steps 0, 2 and 3."""
    folder = tmp_path_factory.mktemp("measured")
    assert command(folder, "first") == 0
    return folder


@pytest.fixture
def trained_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr(run, "train_policy", fail)


def command(folder: Path, name: str, *overrides: str) -> int:
    """Run the command with its results in `outputs/<name>/run`; returns the exit code."""
    place = [f"output_dir={folder}/outputs", f"name={name}", f"hydra.run.dir={folder}/outputs/{name}/run"]
    return run_in_process(*ARGUMENTS, *place, *overrides)


def weights(folder: Path) -> str:
    return sha256(folder / MODEL / "adapter_model.safetensors")


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / METRICS) if "time/evaluate" in line]


def test_what_only_measures_changes_no_bit_of_the_policy(workplace: Path) -> None:
    measured = ["judge=reward_model", "evaluation.prompts=3", "ppo.eval_every=1", "evaluation.best_of=2",
                "ppo.keep_evaluated=true", "evaluation.temperature=1.0",
                "data.eval_prompts=5"]  # fmt: skip
    assert command(workplace, "again", "resume=never", *measured) == 0
    again, first = workplace / "outputs/again/run", workplace / "outputs/first/run"
    assert weights(again) == weights(first)
    assert steps_of(again) == [0, 1, 2, 3]
    assert read_json(again / SUMMARY)["identity"] == read_json(first / SUMMARY)["identity"]
    assert read_json(again / SUMMARY)["evaluation"] != read_json(first / SUMMARY)["evaluation"]


def test_a_reward_model_that_only_judges_trains_nothing_else(workplace: Path) -> None:
    """The value function and the random numbers are those of a run without it."""
    for name, judge in (("alone", "gold"), ("judged", "reward_model")):
        assert command(workplace, name, "resume=never", "scorer=gold", f"judge={judge}") == 0
    alone, judged = (workplace / "outputs" / name / "run" for name in ("alone", "judged"))
    assert weights(alone) == weights(judged) != weights(workplace / "outputs/first/run")
    assert read_json(alone / SUMMARY)["identity"] == read_json(judged / SUMMARY)["identity"]


@pytest.mark.usefixtures("trained_nothing")
def test_another_judge_measures_a_finished_run_again(workplace: Path) -> None:
    folder = workplace / "outputs/first/run"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".log"}
    assert command(workplace, "first", OTHER, "ppo.eval_every=3") == 0
    assert not [path for path, content in before.items() if path.name != ".lock" and path.read_bytes() != content]
    [place] = folder.glob(f"{EVALUATIONS}/*/")
    assert steps_of(place) == [0, 3]
    made, own = read_json(place / SUMMARY), read_json(folder / SUMMARY)
    assert made["evaluation"] == place.name != own["evaluation"]
    assert made["config"]["judge"]["_target_"].endswith("RewardModelJudge")
    for key, step in (("sft_metrics", 0), ("metrics", 3)):  # the same answers, judged otherwise
        for name in ("eval/reward", "eval/true_kl", "eval/gold_utility", "eval/response_tokens"):
            assert made[key][name] == own[key][name] == evaluated_at(place, step)[name]
    outcomes = {line["step"]: line["win"] for line in read_lines(place / "outcomes.jsonl")}
    assert len(outcomes[0]) == len(outcomes[3]) == 4
    # the report shows what was asked for last, and says so; the first command shows the first judge again
    assert shown(workplace) == place.name
    assert command(workplace, "first", OTHER) == 0
    assert steps_of(place) == [0, 3]
    assert command(workplace, "first") == 0
    assert shown(workplace) == "training"


def shown(workplace: Path) -> str:
    """Which evaluation the report of the run says it shows."""
    study, out = workplace / "outputs/first", workplace / "report"
    report([str(study), "--out", str(out)])
    page = (out / "report.html").read_text()
    if "Measured by the evaluation made during the training, GoldJudge" in page:
        return "training"
    digests = [path.name for path in study.glob(f"run/{EVALUATIONS}/*/")]
    return next((digest for digest in digests if f"Measured by the evaluation {digest}, RewardModelJudge" in page), "")


@pytest.mark.usefixtures("trained_nothing")
def test_a_report_shows_the_evaluation_that_is_asked_for(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(workplace, "first", "evaluation.prompts=2", "evaluation.steps=last") == 0
    folder = workplace / "outputs/first/run"
    digest = evaluations.shown_digest(folder)
    assert digest is not None
    assert steps_of(evaluations.place(folder, digest)) == [3]
    for chosen, prompts in ((digest, 2), ("training", 4)):
        report([str(folder.parent), "--out", str(workplace / "report"), "--evaluation", chosen])
        assert f"on {prompts} prompts." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        report([str(folder.parent), "--evaluation", "0123"])
    assert "no finished run with the evaluation 0123" in capsys.readouterr().err
    assert command(workplace, "first", "evaluation.prompts=2") == 0  # now at all steps: only what is missing is made
    assert steps_of(evaluations.place(folder, digest)) == [3, 0]
    assert command(workplace, "first") == 0


@pytest.mark.usefixtures("trained_nothing")
def test_a_run_under_another_name_is_taken_over_and_measured(workplace: Path) -> None:
    assert command(workplace, "third", "evaluation.prompts=3") == 0
    folder = workplace / "outputs/third/run"
    own, made = read_json(folder / SUMMARY), evaluations.shown_summary(folder)
    assert own["same_as"] == "../../first/run"
    assert own["config"]["evaluation"]["prompts"] == 4  # what lies beside it was measured so
    assert made is not None
    assert made["config"]["evaluation"]["prompts"] == 3
    assert len(read_lines(evaluations.shown_folder(folder) / "outcomes.jsonl")[0]["win"]) == 3


@pytest.mark.usefixtures("trained_nothing")
def test_an_interrupted_evaluation_continues_and_says_by_what(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = PPO.emit

    def dying(stage: PPO, metrics: Mapping[str, Any], step: int, **more: Any) -> Any:
        if step == 3:
            raise Interrupted("the endpoint is gone")
        return emit(stage, metrics, step, **more)

    monkeypatch.setattr(PPO, "emit", dying)
    assert command(workplace, "first", "evaluation.max_new_tokens=6") == 75
    monkeypatch.setattr(PPO, "emit", emit)
    with two_threads():
        assert command(workplace, "first", "evaluation.max_new_tokens=6") == 0
    place = evaluations.shown_folder(workplace / "outputs/first/run")
    assert steps_of(place) == [0, 3]
    assert [line["step"] for line in read_lines(place / "outcomes.jsonl")] == [0, 3]
    sessions = read_json(place / SUMMARY)["sessions"]
    assert [(entry["from_step"], entry["threads"]) for entry in sessions] == [(0, 1), (3, 2)]


def test_an_unfinished_run_goes_on_under_another_judge(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its evaluations so far move aside, its steps are not trained again, and step 0 is measured by the new judge."""
    train = PPO.training_step

    def dying(stage: PPO, batch: Any, index: int) -> None:
        if stage.ppo_step == 2:
            raise Interrupted("stopped")
        train(stage, batch, index)

    monkeypatch.setattr(PPO, "training_step", dying)
    assert command(workplace, "broken", "resume=never") == 75
    monkeypatch.setattr(PPO, "training_step", train)
    folder = workplace / "outputs/broken/run"
    first = evaluated_at(folder, 0)
    digest = read_json(folder / earlier.NOTE)["evaluation"]
    (workplace / "outputs/cache/runs").rename(workplace / "outputs/cache/pointers")  # or it would be taken over
    assert command(workplace, "broken", OTHER) == 0
    (workplace / "outputs/cache/runs").rename(workplace / "outputs/cache/pointers/new")
    (workplace / "outputs/cache/pointers").rename(workplace / "outputs/cache/runs")
    assert steps_of(evaluations.place(folder, digest)) == [0, 2]
    assert evaluated_at(evaluations.place(folder, digest), 0) == first
    assert sorted(steps_of(folder)) == [0, 2, 3]
    assert [line["step"] for line in read_metrics(folder) if "ppo/reward" in line] == [1, 2, 3]
    summary = read_json(folder / SUMMARY)
    assert summary["sft_metrics"]["eval/reward"] == first["eval/reward"]
    assert summary["sft_metrics"] == evaluated_at(folder, 0)
    assert weights(folder) == weights(workplace / "outputs/first/run")


def test_kept_steps_that_the_training_did_not_measure_so_lie_beside_the_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that was stopped under one judge and finished under another. What its training left stays as it is."""
    train = PPO.training_step

    def dying(stage: PPO, batch: Any, index: int) -> None:
        if stage.ppo_step == 2:
            raise Interrupted("stopped")
        train(stage, batch, index)

    keeping = ["resume=auto", "ppo.eval_every=1", "ppo.keep_evaluated=true", "seed=3"]
    monkeypatch.setattr(PPO, "training_step", dying)
    assert command(workplace, "two", *keeping) == 75
    monkeypatch.setattr(PPO, "training_step", train)
    assert command(workplace, "two", *keeping, OTHER) == 0
    folder = workplace / "outputs/two/run"
    assert steps_of(folder) == [0, 2, 3]
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".log"}
    assert command(workplace, "asked", "stage=evaluate", "policy=finished", *keeping, OTHER) == 0
    assert {path: path.read_bytes() for path in before} == before
    summary = read_json(folder / SUMMARY)
    place = evaluations.place(folder, summary["evaluation"])
    assert sorted(steps_of(place)) == [0, 1, 2, 3]
    assert (place / ALPACA_EVAL).read_bytes() == (folder / ALPACA_EVAL).read_bytes()  # of the last policy
    asked = read_json(workplace / "outputs/asked/run" / SUMMARY)
    assert without_times(asked["metrics"]) == without_times(summary["metrics"])
    (place / SUMMARY).unlink()  # as if killed before it was written
    assert command(workplace, "asked", "stage=evaluate", "policy=finished", *keeping, OTHER, "resume=never") == 0
    assert read_json(place / SUMMARY)["metrics"] == summary["metrics"]


def test_the_results_of_a_training_are_no_place_for_others(workplace: Path) -> None:
    folder = workplace / "outputs/first/run"
    with pytest.raises(ValueError, match="has the results of the training"):
        check_sound(folder, folder)


@pytest.mark.usefixtures("trained_nothing")
@pytest.mark.parametrize("name", ["old", "elsewhere"])
def test_a_finished_run_of_an_earlier_version_is_found(workplace: Path, name: str) -> None:
    """Its identity covered all keys, its notes say nothing of evaluations, and keys that are newer are missing."""
    outputs = workplace / "outputs"
    pointers = outputs / "cache/runs"
    assert command(workplace, "old") == 0
    folder = outputs / "old/run"
    config = read_json(folder / SUMMARY)["config"]
    for group, key in (("", "policy"), ("evaluation", "steps"), ("ppo", "keep_evaluated")):
        (config[group] if group else config).pop(key, None)
    plan = composed_plan(outputs, *ARGUMENTS)
    chosen = {key: value for key, value in config.items() if key not in IGNORED_GROUPS}
    former = identity.digest({
        **identity.decisive({**chosen, "trainer": {}, "skips_non_finite": True}),
        "stage": "ppo", "needed": [plan.sft_folder.name, plan.reward_folder.name],
    })  # fmt: skip
    note = {**read_json(folder / earlier.NOTE), "identity": former, "config": config} if (
        folder / earlier.NOTE).exists() else {"identity": former, "config": config, "overrides": []}  # fmt: skip
    note.pop("evaluation", None)
    write_json(folder / earlier.NOTE, note)
    summary = {**read_json(folder / SUMMARY), "identity": former, "config": config}
    summary.pop("evaluation", None)
    write_json(folder / SUMMARY, summary)
    for pointer in pointers.glob("*.json"):
        pointer.unlink()
    write_json(pointers / f"{former}.json", {"folder": "../../old/run"})
    assert command(workplace, name, "evaluation.prompts=3") == 0
    assert steps_of(evaluations.shown_folder(outputs / name / "run")) == [0, 3]
    assert not (outputs / name / "run/earlier").exists()
    pointers_now = [json.loads(path.read_text())["folder"] for path in pointers.glob("*.json")]
    assert len(pointers_now) == (2 if name == "old" else 1)
    assert command(workplace, name) == 0
    assert evaluations.shown_folder(outputs / name / "run") == outputs / name / "run"
    for pointer in pointers.glob("*.json"):
        pointer.unlink()
    write_json(pointers / f"{plan.identity}.json", {"folder": "../../first/run"})


@pytest.mark.usefixtures("trained_nothing")
@pytest.mark.parametrize("name", ["first", "taken_over"])
def test_a_finished_run_says_what_it_lacks(workplace: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(workplace, name, "ppo.keep_evaluated=true", "ppo.eval_every=[1,2]") == 0
    said = " ".join("".join(capsys.readouterr()).split())
    for lacking in ("an evaluation at step 1", "its policy of step 1, 2"):
        assert f"is finished, without {lacking}; resume=never trains it again" in said


def test_the_curve_is_measured_again_from_the_kept_policies(workplace: Path) -> None:
    """The policies of all evaluated steps, in one command; each gives the answers that it gave during the training."""
    assert command(workplace, "again") == 0
    folder = workplace / "outputs/again/run"
    assert [path.name for path in sorted((folder / KEPT).iterdir())] == [f"step-00000{step}" for step in (1, 2, 3)]
    place = evaluations.shown_folder(folder)
    assert steps_of(place) == [0, 1, 2, 3]
    for step in (0, 2, 3):
        own, again = (evaluated_at(where, step) for where in (workplace / "outputs/first/run", place))
        assert without_times(own) == without_times(again)
    assert sha256(folder / KEPT / "step-000001/adapter_model.safetensors") != weights(folder)


def test_damaged_weights_are_not_measured(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = workplace / "outputs/again/run"
    (folder / MODEL / "adapter_model.safetensors").write_bytes(b"")
    assert command(workplace, "again", "evaluation.prompts=1") == 2
    assert "is damaged" in error_sentence(capsys.readouterr().err)
