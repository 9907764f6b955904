"""Hyper-parameter search with Optuna: composition, refusals, continuing, and the Pareto front."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from rlhf import root
from rlhf.errors import ConfigError
from rlhf.files import FAILED, PLAN, SUMMARY, read_json, write_json
from rlhf.objectives import objectives_of, result
from rlhf.pipeline.config import settings_of
from rlhf.report.cli import make_report
from rlhf.report.pareto_front import front_table, non_dominated
from rlhf.report.runs import load
from rlhf.sweep.plan import objective_values
from rlhf.sweep.states import states
from tests.helpers.command_line import TINY
from tests.helpers.composed_config import composed, composed_settings
from tests.helpers.made_up_sweeps import write_run
from tests.helpers.subprocess_runs import run_in_subprocess

optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")
BOTH = {"eval/win_rate": "maximize", "eval/true_kl": "minimize"}


# -- composition -------------------------------------------------------------------------------------------------------


def test_every_corner_of_the_space_composes() -> None:
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    config = composed("experiments=search", with_hydra=True)
    axes = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    space, fixed = create_params_from_overrides(axes)
    assert set(space) == {"kl.coef", "ppo.lr", "lora"}
    assert not fixed
    ends = {"kl.coef": (0.005, 0.5), "ppo.lr": (1e-4, 1e-2), "lora": ("r8", "r16", "r64")}
    for name, values in ends.items():
        assert all(space[name]._contains(space[name].to_internal_repr(value)) for value in values)
    for corner in range(3):
        chosen = [f"{name}={values[corner % len(values)]}" for name, values in ends.items()]
        settings = composed_settings("experiments=search", *chosen)
        assert settings.lora.alpha == 8 * settings.lora.r
    assert dict(config.objectives) == BOTH
    assert config.hydra.sweeper.storage == "sqlite:///outputs/search/study.db"


def test_the_command_of_a_wandb_agent_composes() -> None:
    """W&B's own code makes a valid command of the YAML in docs/search.md."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    (block,) = re.findall(r"```yaml\n# sweep.yaml\n(.*?)```", (root() / "docs/search.md").read_text(), re.DOTALL)
    sweep = yaml.safe_load(block)
    chosen = {name: {"value": (axis.get("values") or [axis["max"]])[0]} for name, axis in sweep["parameters"].items()}
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    command = create_sweep_command(sweep["command"])
    assert command[:2] == ["${env}", "rlhf"]
    assert command.pop() == "${args_no_hyphens}"
    config = composed(*command[2:], *arguments)
    settings = settings_of(config)
    assert (settings.ppo.lr, config.kl.coef, settings.lora.r) == (0.01, 0.5, 8)
    assert sweep["metric"]["name"].removesuffix(".last") in BOTH


REFUSED = [
    ("experiments=search objectives={eval/true_kl:down}", "objectives.eval/true_kl=down", "maximize or minimize"),
    (
        "experiments=search ++objectives={eval/win_rat:maximize}",
        "objectives.eval/win_rat",
        "did you mean eval/win_rate?",
    ),
    ("experiments=search seed=1,2", "seed is an axis", "one seed"),
    ("experiments=search replicate=1,2", "replicate is an axis", "one seed"),
    ("hydra/sweeper=search kl.coef=interval(0.01,0.1)", "needs objectives", "eval/win_rate: maximize"),
    ("hydra/sweeper=search objectives={eval/win_rate:maximize}", "nothing to search", "an axis"),
]


@pytest.mark.parametrize(("arguments", "names", "allowed"), REFUSED, ids=[row[1] for row in REFUSED])
def test_a_mistake_is_told_before_anything_is_made(command: Callable, arguments: str, names: str, allowed: str) -> None:
    code, _, err = command("-m", *arguments.split())
    assert code == 2, err
    (said,) = [line for line in err.splitlines() if line.startswith("rlhf: ")]
    assert "Traceback" not in err
    assert names in said
    assert allowed in said
    assert not list(Path("outputs").rglob("*.db"))


def test_without_the_extra_one_sentence_says_what_to_install() -> None:
    code = "import sys; sys.modules['hydra_plugins.hydra_optuna_sweeper'] = None; from rlhf.cli import main; main()"
    arguments = [sys.executable, "-c", code, "-m", "experiments=search"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=root())
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr == "rlhf: hydra/sweeper=search needs the package hydra-optuna-sweeper: "
        "pip install -e '.[optuna]' in the checkout\n"
    )


def test_a_dry_run_shows_a_trial_and_leaves_no_study(command: Callable) -> None:
    code, out, err = command("-m", "experiments=search", "debug=quick", "dry_run=true")
    assert code == 0, err
    assert out.count("missing  kl.coef=0.") == 1
    assert "0 of 24 runs done, 24 waiting" in out
    assert not list(Path("outputs").rglob("*.db"))
    assert not list(Path("outputs").rglob(PLAN))


# -- parts of a search -------------------------------------------------------------------------------------------------


def test_a_job_reports_its_objectives() -> None:
    metrics = {"eval/win_rate": 0.5, "eval/true_kl": 0.1, "eval/reward": float("nan")}
    assert result(metrics, {}) == 0.5
    assert result(metrics, {"eval/true_kl": "minimize"}) == 0.1
    assert result(metrics, BOTH) == [0.5, 0.1]
    assert result(metrics, {**BOTH, "eval/reward": "maximize"}) is None
    assert result(metrics, {**BOTH, "eval/gold_utility": "maximize"}) is None
    with pytest.raises(ConfigError, match="objectives=3 is not allowed"):
        objectives_of({"objectives": 3})


def test_a_launcher_that_brings_nothing_back_reads_the_summary(tmp_path: Path) -> None:
    config = OmegaConf.create({"objectives": BOTH})
    assert objective_values(tmp_path, config) is None
    write_json(tmp_path / SUMMARY, {"metrics": {"eval/win_rate": 0.25, "eval/true_kl": 0.5}})
    assert objective_values(tmp_path, config) == [0.25, 0.5]


def test_trials_without_a_result_are_asked_for_again_and_once() -> None:
    from optuna.distributions import UniformDistribution
    from optuna.trial import TrialState

    from rlhf.sweep.search import enqueue_unfinished

    study, space = optuna.create_study(directions=["maximize", "minimize"]), {"x": UniformDistribution(0, 1)}
    done, failed, killed, empty = study.ask(space), study.ask(space), study.ask(space), study.ask()
    study.tell(done, [1.0, 2.0])
    for trial in (failed, empty):
        study.tell(trial, state=TrialState.FAIL)
    for _ in range(2):
        enqueue_unfinished(study, study.get_trials())
    assert [trial.state for trial in study.get_trials()].count(TrialState.WAITING) == 2
    assert [study.ask(space).params for _ in range(2)] == [failed.params, killed.params]


def test_the_pareto_front_agrees_with_hand_computation() -> None:
    # the first dominates the second, none dominates the fourth, the last two are equal
    points = np.array([[0.5, -0.1], [0.4, -0.2], [0.3, -0.05], [0.9, -0.9], [0.1, -0.01], [0.1, -0.01]])
    assert non_dominated(points).tolist() == [True, False, True, True, True, True]
    assert non_dominated(np.array([[1.0], [3.0], [2.0]])).tolist() == [False, True, False]


def write_trial(folder: Path, coef: float, rate: float, win: float, kl: float, objectives: Mapping[str, str]) -> None:
    config = {"seed": 0, "name": "made_up", "objectives": dict(objectives)}
    metrics = {"eval/win_rate": win, "eval/true_kl": kl}
    overrides = [f"kl.coef={coef}", f"ppo.lr={rate}", "lora=r8"]
    write_run(folder / f"kl.coef-{coef}", "lora_kl", 0, overrides=overrides, config=config, metrics=metrics)


def test_the_front_is_part_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf.report.cli import main

    folder = tmp_path / "search"
    for coef, rate, win, kl in ((0.0123456, 1e-3, 0.5, 0.4), (0.2, 2.5e-4, 0.4, 0.1), (0.1, 2e-3, 0.3, 0.2)):
        write_trial(folder, coef, rate, win, kl, BOTH)
    main([str(folder)])
    shown = capsys.readouterr().out
    assert "0.0123" in shown
    assert "0.000250" in shown
    assert (folder / "report/front.csv").read_text().splitlines() == [
        "win rate (%),true KL (nats per token),kl.coef,ppo.lr,run",
        "50.0,0.4,0.0123456,0.001,kl.coef-0.0123456",
        "40.0,0.1,0.2,0.00025,kl.coef-0.2",
    ]
    assert "2 of 3 configurations" in (folder / "report/report.html").read_text()
    assert not (folder / "report/gains.md").exists()
    drawn = (folder / "report/figures/front.csv").read_text().splitlines()
    numbered = [line.split(",")[-3:] for line in drawn[1:]]
    assert sorted(numbered) == [["30.0", "0.2", ""], ["40.0", "0.1", "2"], ["50.0", "0.4", "1"]]
    assert not (folder / "report/figures/gains.csv").exists()
    only = tmp_path / "one"
    write_trial(only, 0.1, 1e-3, 0.5, 0.4, {"eval/true_kl": "minimize"})
    write_trial(only, 0.2, 1e-3, 0.4, 0.1, {"eval/true_kl": "minimize"})
    table = front_table(load([only]))
    assert table is not None
    assert [row[-1] for row in table.texts()] == ["kl.coef-0.2"]
    plain = tmp_path / "plain"
    write_run(plain / "a", "lora_kl", 1)
    make_report([plain])
    assert not (plain / "report/front.md").exists()


# -- a study -----------------------------------------------------------------------------------------------------------

SCORE = """
import os
from pathlib import Path
from hydra.core.hydra_config import HydraConfig

def score(prompts, responses):
    said = " ".join(HydraConfig.get().overrides.task)
    if Path("broken").exists() and "lora=r16" in said:
        raise RuntimeError("the moon is full")
    if Path("kill").exists() and Path("kill").read_text() in said:
        os._exit(9)
    return [len(response) / 100 for response in responses]
"""


def trials(folder: Path) -> list[Any]:
    storage = f"sqlite:///{folder}/outputs/search/study.db"
    (known,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(known.study_name, storage).trials


@pytest.mark.long
def test_a_study_outlives_failures_and_kills_and_makes_no_trial_twice(tmp_path: Path) -> None:
    """Four trials on debug-size models: those with one of the ranks fail, and one of these kills the next command."""
    (tmp_path / "mine.py").write_text(SCORE)
    (tmp_path / "broken").touch()
    job = [*TINY, "ppo.steps=1", "ppo.eval_every=1", "scorer=function", "scorer.function=mine.score"]
    axes = ["lora=r8,r16", "ppo.lr=interval(0.001,0.008)", "kl.coef=0.1"]
    command = ["-m", "experiments=search", "hydra/launcher=basic", *job, *axes]

    def search(number: int, code: int = 0) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
            return run_in_subprocess(tmp_path, *command, f"hydra.sweeper.n_trials={number}", code=code)

    said = search(4, code=1)
    study, states_of = tmp_path / "outputs/search", lambda: [trial.state.name for trial in trials(tmp_path)]
    assert "the moon is full" in said
    failed = states_of().count("FAIL")
    assert 0 < failed < 4
    assert len(list(study.glob(f"*/{FAILED}"))) == failed
    assert "The best of many single runs" in said
    made = {path: path.stat().st_mtime_ns for path in study.glob(f"*/{SUMMARY}")}
    assert len(made) == 4 - failed
    assert [run.state for run in states(study)].count("done") == 4 - failed

    # killed while the first failed trial is repeated
    (tmp_path / "broken").unlink()
    first = next(trial for trial in trials(tmp_path) if trial.state.name == "FAIL")
    (tmp_path / "kill").write_text(f"ppo.lr={first.params['ppo.lr']}")
    search(4, code=9)
    assert "RUNNING" in states_of()
    (tmp_path / "kill").unlink()

    said = search(4)
    assert "4 of 4 runs done" in said
    assert states_of().count("COMPLETE") == 4
    assert all(path.stat().st_mtime_ns == changed for path, changed in made.items())
    done = [trial for trial in trials(tmp_path) if trial.state.name == "COMPLETE"]
    assert first.params in [trial.params for trial in done]
    for trial in done:
        named = {f"lora={trial.params['lora']}", f"ppo.lr={trial.params['ppo.lr']}"}
        (run,) = [run for run in states(study) if named <= set(run.overrides)]
        metrics = read_json(run.folder / SUMMARY)["metrics"]
        assert trial.values == [metrics["eval/win_rate"], metrics["eval/true_kl"]]

    # with nothing left to do, then with more trials
    before = len(trials(tmp_path))
    assert "4 of 4 trials are finished" in search(4)
    assert len(trials(tmp_path)) == before
    search(5)
    assert len(trials(tmp_path)) == before + 1
    assert states_of().count("COMPLETE") == 5
    assert (study / "report/front.md").exists()
