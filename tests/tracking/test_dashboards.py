"""A sweep's offline W&B files, read back; every logged metric is defined in docs/metrics.md."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from rlhf import root
from rlhf.data.farm import Farm
from rlhf.files import SUMMARY, read_lines
from rlhf.guards.detectors import DETECTORS, SKIPPED
from rlhf.report.sync import offline_runs
from rlhf.tracking.metrics_file import read_metrics
from rlhf.tracking.summary import read_summary
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.openai_server import serving
from tests.helpers.wandb_files import OfflineRun, read_runs

pytestmark = pytest.mark.slow


def respond(request: dict[str, Any], number: int) -> str:
    """Answers of a judge and of a fact checker."""
    asked = request["messages"][-1]["content"]
    if asked.startswith("The sentence"):
        return "- A fact.\n- Another."
    return "True" if "Statement: " in asked else "Verdict: 1"


def interrupt_a_copy_of(outputs: Path) -> Path:
    """Leave one run as after a kill behind step 1: no summary, the checkpoint of step 1, no W&B files."""
    copy = outputs.resolve().with_name("interrupted")
    shutil.copytree(outputs, copy)
    for past in (copy / "cache" / "runs", *copy.glob("study/**/wandb")):
        shutil.rmtree(past, ignore_errors=True)
    run = next(copy.glob(f"study/*/{SUMMARY}")).parent
    for left in (run / SUMMARY, *run.glob("checkpoints/step-000002.*")):
        left.unlink()
    return run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A sweep of two runs with all features on, and one FActScore evaluation; all offline."""
    folder = tmp_path_factory.mktemp("study")
    with serving(respond) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DATA_DIR"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(folder / "none"))
        wandb.teardown()
        client = f"client={{base_url: {server.url!r}, api_key_env: null}}"
        Path("hard.json").write_text(json.dumps([{"difficulty": i % 3} for i in range(8)]))
        job = [
            *TINY, "logger=wandb", "name=study", "judge=llm_pool", "judge.model=some", f"judge.{client}",
            "evaluation.difficulty=hard.json", "data.fame=0.5", "reference=ema",
            "ppo.target_kl=1e-9", "ppo.lr=0.01", "ppo.epochs=2", "ppo.steps=2", "ppo.eval_every=2",
            "guards.explained_variance={window: 1, limit: 1.0}",
            "report={figures: [{name: win_rate, title: W, kind: curve, y: eval/win_rate}]}",
        ]  # fmt: skip
        assert run_in_process("-m", *job, "seed=1,2") == 0
        left = interrupt_a_copy_of(Path("outputs"))
        seed = (read_summary(Path("outputs", "study", left.name)) or {})["config"]["seed"]
        assert run_in_process(*job, f"seed={seed}", f"output_dir={folder}/interrupted", f"hydra.run.dir={left}") == 0
        farm = Farm(people=12)
        people = [f"Introduce {person.name}.\n" for person in farm.world.people[:4]]
        rows = [{"entity": text[10:-2], "text": farm.reference(text)} for text in people]
        Path("people.jsonl").write_text("\n".join(map(json.dumps, rows)))
        scored = [
            *TINY, "stage=evaluate", "name=facts", "evaluation=factscore", "evaluation.factscore.model=some",
            "evaluation.factscore.entities=people.jsonl", f"evaluation.factscore.{client}",
            "evaluation.temperature=1",  # the likeliest answer of this model says nothing
        ]  # fmt: skip
        assert run_in_process(*scored) == 0
        compared = ["preferences=simulated", "preferences.max_new_tokens=40", "name=compared", "stage=preferences"]
        assert run_in_process(*TINY, *compared) == 0
        more = [
            "name=more", "scorer=ensemble", "scorer.members=2", "loss_terms=[old_kl]", "ppo.ptx_coef=0.1",
            "evaluation.diversity_samples=2", "evaluation.texts=people.jsonl",
        ]  # fmt: skip
        assert run_in_process(*TINY, *more) == 0
        assert run_in_process(*TINY, "name=dpo", "stage=dpo") == 0
        wandb.finish()
        wandb.teardown()
    outputs = folder / "outputs"
    finished = sorted(path.parent for path in outputs.glob(f"study/*/{SUMMARY}"))
    resumed = read_runs(folder / "interrupted")
    return SimpleNamespace(outputs=outputs, folders=finished, runs=read_runs(outputs), resumed=resumed)


def of_stage(runs: list[OfflineRun], stage: str) -> list[OfflineRun]:
    return [run for run in runs if run.stage == stage]


def test_a_sweep_is_a_group_of_runs_by_stage_with_nested_config_and_tags(study: SimpleNamespace) -> None:
    group = [run for run in study.runs if run.group == "study"]
    stages = [run.stage for run in group]
    assert sorted(stages) == ["ppo", "ppo", "report", "reward", "sft"]
    assert all(run.project == "rlhf" and run.exit_code == 0 and not run.resumed for run in group)
    for run, folder in zip(of_stage(group, "ppo"), study.folders, strict=True):
        summary = read_summary(folder)
        assert summary is not None
        assert run.id == f"ppo-{summary['identity']}"
        assert run.name == folder.name
        assert {key: run.config[key] for key in summary["config"]} == json.loads(json.dumps(summary["config"]))
        assert run.config["ppo"]["epochs"] == 2
        assert f"seed {summary['config']['seed']}" in run.tags
        assert "clamped_kl" in run.tags
    for stage, part in (("sft", "sft"), ("reward", "reward")):
        (run,) = of_stage(group, stage)
        config = run.config[part]
        assert sorted(run.tags) == sorted(["tiny", f"lora r{config['lora']['r']}", f"seed {config['seed']}"])


DESIGN = """
ppo/reward ppo/shaped_reward ppo/penalty ppo/k1 ppo/k3 ppo/entropy ppo/ratio ppo/clip_fraction ppo/policy_loss
ppo/value_loss ppo/explained_variance ppo/response_tokens ppo/missing_eos ppo/grad_norm ppo/lr ppo/rollouts_per_second
time/generate time/score time/update time/evaluate sft/loss sft/perplexity reward/loss reward/accuracy reward/margin
eval/win_rate eval/win_rate_se eval/true_kl eval/response_tokens eval/reward eval/factual_precision
eval/facts_per_response eval/length_adjusted_win_rate
"""


def test_the_offline_files_of_a_sweep_hold_every_metric_of_the_design(study: SimpleNamespace) -> None:
    group = [run for run in study.runs if run.group == "study"]
    assert set(DESIGN.split()) <= {key for run in group for key in run.keys}


def test_the_offline_files_hold_every_number_that_was_logged(study: SimpleNamespace) -> None:
    cached = {path.name: path for path in (study.outputs / "cache").glob("*-*/")}
    by_name = {folder.name: folder for folder in study.folders} | cached
    trained = [run for run in study.runs if run.group == "study" and run.stage != "report"]
    assert len(trained) == 4
    for run in trained:
        lines = read_metrics(by_name[run.name])
        assert lines
        for line in lines:
            for key, value in line.items():
                if key not in ("step", "time"):
                    assert (line["step"], value) in run.values(key), (run.id, key)


def test_every_metric_has_the_stages_step_as_axis_and_its_extremes(study: SimpleNamespace) -> None:
    for run in of_stage(study.runs, "ppo"):
        numbers = {key for key in run.keys if re.match(r"(ppo|eval|time|judge|guard)/", key)}
        assert len(numbers) > 30
        for key in numbers:
            assert run.axes[f"{key.partition('/')[0]}/*"] == "step"
            values = [value for _, value in run.values(key)]
            assert run.summary[key] == pytest.approx({"min": min(values), "max": max(values), "last": values[-1]})


def test_samples_of_each_evaluation_are_a_table(study: SimpleNamespace) -> None:
    for run, folder in zip(of_stage(study.runs, "ppo"), study.folders, strict=True):
        logged = [(row["step"], row["samples.path"]) for row in run.history if "samples.path" in row]
        assert [step for step, _ in logged] == [0, 2]
        for step, path in logged:
            table = json.loads((run.folder / "files" / path).read_text())
            expected = [row for row in read_lines(folder / "samples.jsonl") if row["step"] == step]
            assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == expected
            assert {"prompt", "response", "reference_output", "reward", "win"} <= set(table["columns"])
    staged = list(study.outputs.rglob("wandb-staging/artifacts/staging/*"))
    assert staged, "W&B keeps what it has to send outside of the outputs"


def test_histograms_count_every_rollout_and_every_token(study: SimpleNamespace) -> None:
    for run, folder in zip(of_stage(study.runs, "ppo"), study.folders, strict=True):
        metrics = {line["step"]: line for line in read_metrics(folder) if "ppo/reward" in line}
        rewards = {row["step"]: row for row in run.history if "histogram/reward.values" in row}
        assert set(rewards) == set(metrics) == {1, 2}
        for step, row in rewards.items():
            assert sum(row["histogram/reward.values"]) == 8
            assert row["histogram/reward.bins"][0] <= metrics[step]["ppo/reward"] <= row["histogram/reward.bins"][-1]
            counts, edges = row["histogram/ratio.values"], row["histogram/ratio.bins"]
            assert len(edges) == len(counts) + 1
            centre = sum(count * (low + high) / 2 for count, low, high in zip(counts, edges, edges[1:], strict=False))
            assert centre / sum(counts) == pytest.approx(metrics[step]["ppo/ratio"], abs=edges[1] - edges[0])


def test_the_lineage_leads_from_sft_to_the_report(study: SimpleNamespace) -> None:
    """An artefact that one run made and another uses has the same digest in both."""
    group = [run for run in study.runs if run.group == "study"]
    made = {name: (run.stage, found) for run in group for name, found in run.made.items()}
    edges = {(made[name][0], run.stage) for run in group for name in run.used}
    assert edges == {("sft", "reward"), ("sft", "ppo"), ("reward", "ppo"), ("ppo", "report")}
    for run in group:
        for name, found in run.used.items():
            assert made[name][1] == found
    report = of_stage(group, "report")[0]
    assert len(report.used) == 2
    assert report.made[report.id][0] == "report"
    page = next(row["report.path"] for row in report.history if "report.path" in row)
    assert "<title>" in (report.folder / "files" / page).read_text()


def test_no_file_is_left_out_of_wandb(study: SimpleNamespace) -> None:
    """Files that W&B cannot take are reported in a warning only; here there is none."""
    logs = [path.read_text() for path in study.outputs.rglob("*.log") if "wandb" not in path.parts]
    assert any("guard explained_variance" in text for text in logs)
    assert not [line for text in logs for line in text.splitlines() if "W&B" in line]


def test_a_continued_run_goes_on_under_its_id(study: SimpleNamespace) -> None:
    (run,) = study.resumed
    assert run.resumed
    assert run.id in {run.id for run in of_stage(study.runs, "ppo")}
    assert [step for step, _ in run.values("ppo/reward")] == [1, 2], "what W&B may have lost is sent again"
    assert not run.alerts, "it was alerted of before"


def test_a_guard_alerts_once(study: SimpleNamespace) -> None:
    for run in of_stage(study.runs, "ppo"):
        assert [step for step, _ in run.values("guard/explained_variance")] == [1, 2]
        told = [text for title, text in run.alerts if title == "guard explained_variance"]
        assert len(told) == 1
        assert told[0].startswith("step 1: the value function")


def test_what_waits_to_be_sent_is_found_oldest_first(study: SimpleNamespace, tmp_path: Path) -> None:
    waiting = [path.name for path in offline_runs([study.outputs])]
    assert len(waiting) == len(study.runs)
    begun = [name.split("-")[2] for name in waiting]
    assert begun == sorted(begun)
    first = [next(i for i, name in enumerate(waiting) if f"-{stage}-" in name) for stage in ("sft", "reward", "ppo")]
    assert first == sorted(first)  # also if two of them began in the same second
    sent = tmp_path / "offline-run-1-x"
    sent.mkdir()
    for name in ("run-x.wandb", "run-x.wandb.synced"):
        (sent / name).touch()
    assert offline_runs([tmp_path]) == []


# -- docs/metrics.md ---------------------------------------------------------------------------------------------------

DOCUMENTED = re.findall(r"^\| `([a-z]+/\w+)` \|", (root() / "docs" / "metrics.md").read_text(), re.MULTILINE)

UNKNOWN = {"eval/facts_lost"}  # these models know no fact that could be lost; tests/stages/test_costs.py measures it


def logged(outputs: Path) -> set[str]:
    """All metric names in the files metrics.jsonl and summary.json below a folder."""
    keys: set[str] = set()
    for path in outputs.rglob("metrics.jsonl"):
        keys |= {key for line in read_metrics(path.parent) for key in line} - {"step", "time"}
        keys |= (read_summary(path.parent) or {"metrics": {}})["metrics"].keys()
    return {key.removesuffix("_before") for key in keys}


def test_every_logged_metric_is_documented_and_every_documented_one_is_logged(study: SimpleNamespace) -> None:
    guards = {f"guard/{name}" for name in DETECTORS} | {SKIPPED}
    in_wandb = {key.partition(".")[0] for run in study.runs for key in run.keys if key.startswith("histogram/")}
    there = logged(study.outputs) | guards | in_wandb | UNKNOWN
    assert len(DOCUMENTED) == len(set(DOCUMENTED))
    assert there - set(DOCUMENTED) == set(), "not in docs/metrics.md"
    assert set(DOCUMENTED) - there == set(), "in docs/metrics.md, and nothing logs it"
