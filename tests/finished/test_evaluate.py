"""`rlhf stage=evaluate policy=…`: any policy is measured by any judge, without a training step."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf import root
from rlhf.data.farm import Farm
from rlhf.data.records import as_records
from rlhf.errors import ConfigError
from rlhf.files import (
    ALPACA_EVAL,
    EVALUATIONS,
    KEPT,
    METRICS,
    MODEL,
    NOTE,
    SUMMARY,
    locks,
    read_json,
    read_lines,
    write_json,
)
from rlhf.finished.as_trained import as_trained
from rlhf.finished.policies import open_policy
from rlhf.finished.run import FinishedRun
from rlhf.pipeline import run
from rlhf.pipeline.config import data_source, settings_of
from rlhf.report.cli import main as report
from rlhf.tracking.metrics_file import evaluated_at
from tests.helpers.command_line import TINY, error_sentence, run_in_process
from tests.helpers.composed_config import composed
from tests.helpers.finished_runs import TEMPLATE, finished_outputs
from tests.helpers.run_results import without_times

pytestmark = pytest.mark.slow
ARGUMENTS = [*TINY, "logger=csv", "ppo.eval_every=1", "ppo.lr=0.05", "ppo.keep_evaluated=true"]
# What the runs read and how they answer, for policies that have no configuration of their own.
DATA = [argument for argument in TINY if argument.startswith(("debug", "data", "evaluation.", "generation.max"))]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs with a finished run `study/run`, evaluated at every step."""
    folder = tmp_path_factory.mktemp("policies") / "outputs"
    assert run_in_process(*ARGUMENTS, f"output_dir={folder}", "name=study", f"hydra.run.dir={folder}/study/run") == 0
    return folder


@pytest.fixture(autouse=True)
def trains_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keys: Any) -> None:
        raise AssertionError("it trains")

    request.getfixturevalue("outputs")
    for name in ("train_policy", "build_sft", "build_reward"):
        monkeypatch.setattr(run, name, fail)


def measured(outputs: Path, name: str, policy: Any, *overrides: str, code: int = 0) -> dict[str, Any]:
    """The summary that the command leaves in its folder; {} if it fails with the exit code that is expected."""
    place = [f"output_dir={outputs}", f"name={name}", f"hydra.run.dir={outputs}/{name}/run"]
    assert run_in_process("stage=evaluate", f"policy={policy}", *place, *overrides) == code
    return {} if code else read_json(outputs / name / "run" / SUMMARY)


def results(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics without those that depend on the clock or on earlier evaluations."""
    return {key: value for key, value in without_times(metrics).items() if "_fall" not in key}


def test_a_finished_run_is_measured_with_all_that_it_has_kept(outputs: Path) -> None:
    folder = outputs / "study/run"
    summary = measured(outputs, "second", folder, "judge=reward_model", "evaluation.temperature=1.0",
                       "evaluation.best_of=2")  # fmt: skip
    [place] = folder.glob(f"{EVALUATIONS}/*/")
    assert [line["step"] for line in read_lines(place / METRICS)] == [0, 1, 2, 3]
    assert summary["same_as"] == f"../../study/run/{EVALUATIONS}/{place.name}"
    assert summary["metrics"] == evaluated_at(place, 3)
    assert summary["sft_metrics"] == evaluated_at(place, 0)
    assert summary["config"]["model"]["config"]["hidden_size"] == 32  # the run's, not the command's
    assert summary["config"]["judge"]["_target_"].endswith("RewardModelJudge")
    assert (outputs / "second/run/outcomes.jsonl").read_text() == (place / "outcomes.jsonl").read_text()
    before = (place / METRICS).read_text()
    assert measured(outputs, "second", folder, "judge=reward_model", "evaluation.temperature=1.0",
                    "evaluation.best_of=2")["metrics"] == summary["metrics"]  # fmt: skip
    assert (place / METRICS).read_text() == before


def test_one_of_its_policies_is_measured_alone(outputs: Path) -> None:
    folder = outputs / "study/run"
    own = measured(outputs, "one", folder / KEPT / "step-000001")
    assert own["metrics"] == evaluated_at(folder, 1)  # the training has measured the same
    other = measured(outputs, "one", folder / KEPT / "step-000001", "evaluation.kl_prompts=1")
    place = outputs / "one/run" / other["same_as"]
    assert [line["step"] for line in read_lines(place / METRICS)] == [1]
    assert (other["metrics"]["eval/reward"], other["metrics"]["eval/true_kl"] == own["metrics"]["eval/true_kl"]) == (
        own["metrics"]["eval/reward"], False)  # fmt: skip
    assert measured(outputs, "one", folder / MODEL)["metrics"] == evaluated_at(folder, 3)
    assert (outputs / "one/run/earlier").is_dir()  # the results that were there before


def test_a_run_reads_other_data_with_its_own_tokenizer(outputs: Path) -> None:
    """The words of another farm have other ids there; the answers are those of the model alone."""
    folder = outputs / "study/run"
    summary = measured(outputs, "elsewhere", folder, "data.seed=1")
    config = OmegaConf.create(summary["config"])
    settings, source = settings_of(config), data_source(config)
    own = FinishedRun.open(folder).tokenizer()
    assert source.tokenizer().get_vocab() != own.get_vocab()
    prompts = as_records(source.load("eval"), "eval")[: settings.evaluation.prompts]
    rows = read_json(outputs / "elsewhere/run" / ALPACA_EVAL)
    assert [row["output"] for row in rows] == open_policy(str(folder)).answers(prompts, settings, source)


def test_a_run_reads_other_data_in_its_own_template(tmp_path: Path) -> None:
    trained = FinishedRun.open(finished_outputs(tmp_path / "outputs").ppo)
    for words in (["data=alpaca"], ["data=stack_exchange"], ["data=hub", "data.sft=o/n"]):
        merged = as_trained(composed("stage=evaluate", *words), trained, words)
        assert merged.data.template == TEMPLATE
        assert merged.data._target_ == composed(*words).data._target_
    for words in (["data/template=short"], ["data.template.with_input=x"]):
        with pytest.raises(ConfigError, match="reads prompts in the template of its training"):
            as_trained(composed("stage=evaluate", "data=alpaca", *words), trained, words)


@pytest.mark.parametrize("changed", [True, False])
def test_a_run_is_measured_when_no_other_process_works_in_its_folder(
    outputs: Path, changed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And only if it is still the same run then."""
    folder = outputs / "study/run"
    summary, before = read_json(folder / SUMMARY), set(folder.glob(f"{EVALUATIONS}/*"))
    held, waited = locks.acquire(folder / ".lock", "a test works in it"), []

    class Leaves(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "another process works in" in record.getMessage():
                waited.append(set(folder.glob(f"{EVALUATIONS}/*")))
                write_json(folder / SUMMARY, {**summary, "identity": "another"} if changed else summary)
                held.release()

    monkeypatch.setattr(locks.log, "level", logging.INFO)
    monkeypatch.setattr(locks.log, "handlers", [Leaves()])
    try:
        measured(outputs, "locked", folder / MODEL, "evaluation.prompts=1", code=2 if changed else 0)
    finally:
        write_json(folder / SUMMARY, summary)
        held.release()
    assert waited == [before]
    assert len(set(folder.glob(f"{EVALUATIONS}/*/")) - before) == (not changed)
    if changed:
        assert "no longer holds the run" in error_sentence(capsys.readouterr().err)


def test_models_adapters_and_outputs_from_elsewhere(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same policies, without their runs, have the same win rates and gold utilities."""
    folder = outputs / "study/run"
    [sft] = outputs.glob("cache/sft-*/model")
    shutil.copytree(folder / MODEL, tmp_path / "adapter")
    rows = json.loads((folder / "alpaca_eval.json").read_text())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for policy, step in ((sft, 0), (f"{folder}@sft", 0), (tmp_path / "adapter", 3), (tmp_path / "rows.jsonl", 3)):
        found = results(measured(outputs, "outside", policy, *DATA)["metrics"])
        own = results(evaluated_at(folder, step))
        assert {key: own[key] for key in found} == found
        assert {"eval/win_rate", "eval/gold_utility", "eval/factual_precision"} <= found.keys()
    capsys.readouterr()
    draws = measured(outputs, "outside", "reference", *DATA)["metrics"]
    said = capsys.readouterr().out
    assert re.search(r"┃\s+┃ reference ┃", said)
    assert re.search(r"│ win rate against the reference \(%\) │\s+50\.00 │", said)
    assert "eval/" not in said
    assert draws["eval/win_rate"] == 0.5
    assert draws["eval/gold_utility"] > own["eval/gold_utility"]


def variety(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(set(response))) for response in responses]


def test_the_best_of_several_answers_of_a_model(outputs: Path) -> None:
    [sft] = outputs.glob("cache/sft-*/model")
    decoding = [*DATA, "evaluation.temperature=1.0", "scorer=function", f"scorer.function={__name__}.variety"]
    means = [measured(outputs, "best", sft, *decoding, f"evaluation.best_of={count}")["metrics"]["eval/reward"]
             for count in (1, 8)]  # fmt: skip
    assert means[1] > means[0]


def test_data_of_a_run_need_no_comparisons(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its reward model already."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"instruction": row["prompt"].strip(), "output": row["reference_output"]}
        for row in Farm(people=12, eval_prompts=3).load("eval")
    ]
    Path("eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = ["data.eval=eval.jsonl", "data.verbatim=true"]
    found = measured(outputs, "alone", outputs / "study/run", "data=hub", *template, "judge=reward_model")
    assert found["metrics"]["eval/reward"] != found["sft_metrics"]["eval/reward"]


def test_a_preview_says_which_runs_have_to_be_trained_first(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stage=evaluate", "policy=finished", *ARGUMENTS, f"output_dir={outputs}", "name=preview", "dry_run=true"]
    assert run_in_process("-m", *words, "seed=0,7") == 0
    said = capsys.readouterr().out.splitlines()
    [ready, waits, why, *_] = [line for line in said if line.startswith(("done", "measure", "waits", " "))]
    assert (ready.split()[0], waits.split()[0]) == ("done", "waits")
    assert "seed=7" in waits
    assert "holds no finished run of this configuration; allowed: " in why
    assert not list(outputs.glob(f"preview/*/{NOTE}"))


def test_a_study_measures_the_finished_runs_of_its_configuration(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = measured(outputs, "table", "finished", *ARGUMENTS)
    assert own["metrics"] == read_json(outputs / "study/run" / SUMMARY)["metrics"]
    other = measured(outputs, "table", "finished", *ARGUMENTS, "judge=reward_model")
    assert other["sft_metrics"]["eval/reward"] == own["sft_metrics"]["eval/reward"]
    report([str(outputs / "table")])
    said = " ".join(capsys.readouterr().out.split())
    assert f"Measured by the evaluation {other['evaluation']}, RewardModelJudge on 4 prompts." in said
    measured(outputs, "table", "finished", *ARGUMENTS, "seed=7", code=2)
    assert "holds no finished run of this configuration" in error_sentence(capsys.readouterr().err)


BAD = [
    ("study/run", ["ppo.steps=9"], "ppo.steps=9: policy=.*/study/run is measured as it was trained; allowed: judge, "),
    ("study/run", ["experiments=table1"], "experiments=table1: policy=.* is measured as it was trained"),
    ("study/run", ["debug=quick"], "debug=quick: policy=.*/study/run is measured as it was trained; allowed: judge, "),
    ("study/run", ["stage=ppo"], "policy=.*/study/run is what stage=evaluate measures"),
    ("study/run", ["evaluation.best_of=4"], "evaluation.best_of above 1 needs evaluation.temperature above 0"),
    ("study/run/kept/step-000009", [], "has no kept/step-000009|no such"),
    ("study/run@sft", ["judge=reward_model"], "judge=reward_model is that of a run"),
    ("study/run@sft", ["evaluation.best_of=4", "evaluation.temperature=1"], "scorer=RewardModelScorer reads no texts"),
    ("study/run/alpaca_eval.json", [*DATA, "evaluation.prompts=5"], "has no output for 1 of the 5"),
    ("study/nothing.json", DATA, "nothing.json"),
    ("study/nothing", DATA, r"no such file or folder; allowed: finished \(the run of this .*RUN or RUN/model, RUN/mod"),
    ("study/run", ["data=hub", "data.eval=strange.jsonl", "judge=reward_model"], "are no words of its vocabulary"),
]


@pytest.mark.parametrize(("policy", "overrides", "said"), BAD)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    outputs: Path,
    policy: str,
    overrides: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("strange.jsonl").write_text('{"prompt": "Which rivers cross Europe today?", "reference": "Several do so."}\n')
    measured(outputs, "bad", outputs / policy, *overrides, code=2)
    sentence = error_sentence(capsys.readouterr().err)
    assert re.search(said, sentence), sentence
    assert not (outputs / "bad/run" / SUMMARY).exists()
    assert not (outputs / "bad/run" / NOTE).exists()


# -- docs/evaluation.md ------------------------------------------------------------------------------------------------

PAGE = (root() / "docs" / "evaluation.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split()[1:] for text in BLOCKS for line in text.splitlines() if "…" not in line and "-m" not in line]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_trains_nothing(words: list[str], outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder whose `outputs/rlhf/default` is the finished run, at its sizes."""
    monkeypatch.chdir(outputs.parent)
    (outputs / "rlhf").mkdir(exist_ok=True)
    if not (outputs / "rlhf/default").exists():
        (outputs / "rlhf/default").symlink_to(outputs / "study/run", target_is_directory=True)
    sizes = ARGUMENTS if "stage=evaluate" not in words else DATA if is_outside(words[1]) else []
    before = set(outputs.glob(f"rlhf/*/{SUMMARY}"))
    assert run_in_process(*sizes, *words) == 0
    assert len(set(outputs.glob(f"rlhf/*/{SUMMARY}")) - before) == 1


def is_outside(policy: str) -> bool:
    return policy.endswith(("@sft", ".json", "=reference"))


def test_the_page_has_commands_of_both_kinds() -> None:
    assert {"stage=evaluate" in words for words in COMMANDS} == {True, False}
