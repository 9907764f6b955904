"""A real sweep over whole pipelines: what is built, what is shared, and what the report counts."""

from pathlib import Path

import pytest

from rlhf.files import SUMMARY, read_json
from rlhf.report.cli import make_report
from rlhf.report.runs import load
from tests.helpers.command_line import TINY, run_in_process

AXES = ["variant=lora_kl,lora_none", "replicate=1,2"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants on two pipelines."""
    folder = tmp_path_factory.mktemp("replicates")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_in_process("-m", *TINY, "name=study", *AXES) == 0
    return folder / "outputs" / "study"


@pytest.mark.slow
def test_rows_share_the_upstream_models_of_a_replicate_and_nothing_else(study: Path) -> None:
    cache = study.parent / "cache"
    assert [len(list(cache.glob(f"{stage}-*/{SUMMARY}"))) for stage in ("sft", "reward")] == [2, 2]
    kl, none = load([study]).trained
    models = [[run.summary["reward_model"] for run in row.runs] for row in (kl, none)]
    assert models[0] == models[1]
    assert len(set(models[0])) == 2
    assert [run.seeds for run in kl.runs] == [(1, 0, 1, 1), (2, 0, 2, 2)]


@pytest.mark.slow
def test_the_report_counts_pipelines_and_pairs_them(study: Path) -> None:
    report = make_report([study]).parent
    table = (report / "table.md").read_text()
    assert "| row | pipelines |" in table
    assert "count 2 pipelines" in table
    assert "unpaired interval" in (report / "gains.md").read_text()
    assert "SD over pipelines" in (report / "variance.md").read_text()


@pytest.mark.slow
def test_the_single_axes_reach_the_same_runs(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parents[1])
    seeds = ["seed=2", "sft.seed=2", "reward.seed=2"]
    assert run_in_process("-m", *TINY, "name=single", "variant=lora_kl", *seeds) == 0
    (made,) = study.parent.glob(f"single/*/{SUMMARY}")
    same = (made.parent / read_json(made)["same_as"]).resolve()
    assert same in {run.folder for run in load([study]).trained[0].runs}
