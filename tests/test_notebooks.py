"""The package in a notebook: what `rlhf.compose`, `rlhf.run`, `rlhf.results` and `rlhf.load_policy` give."""

import logging
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import rlhf
from rlhf import root
from rlhf.errors import ConfigError, NoRunsError, RunError
from rlhf.files import read_json
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.made_up_sweeps import PROMPTS, STEPS, write_sweep

# without reward.baseline_rows, of which there are more (256) than demonstrations (200)
OVERRIDES = [override for override in TINY if not override.startswith("reward.baseline_rows")]


@pytest.mark.slow
def test_a_run_in_a_notebook_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = logging.getLogger().handlers[:], logging.getLogger().level
    found = rlhf.run(rlhf.compose(OVERRIDES))
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert (logging.getLogger().handlers, logging.getLogger().level) == before
    (line,) = found.runs.to_dict("records")
    folder = Path(line["folder"])
    assert line["eval/reward"] == read_json(folder / "summary.json")["metrics"]["eval/reward"]
    assert list(found.curves.step) == [0, 1, 2, 3]
    assert len(found.outcomes) == 2 * 4  # evaluations, instructions
    assert set(found.samples.step) == {0, 3}
    # the command finds the run finished, in the same folder
    written = (folder / "metrics.jsonl").read_bytes()
    assert run_in_process(*OVERRIDES) == 0
    assert (folder / "metrics.jsonl").read_bytes() == written
    assert [path.name for path in Path("outputs/rlhf").iterdir()] == [folder.name]
    # its policy gives the answers that the run recorded
    policy = rlhf.load_policy(folder)
    last = found.samples[found.samples.step == 3].iloc[0]
    answer = policy.answer(last.prompt, temperature=0)
    assert answer.text.strip() == last.response.strip()
    assert set(answer.scores) == {"reward", "gold utility"}
    assert policy.answer(last.prompt, temperature=1, seed=5) == policy.answer(last.prompt, temperature=1, seed=5)
    with pytest.raises(RunError, match="generates no text"):
        rlhf.load_policy(next(Path("outputs/cache").glob("reward-*/")))


@pytest.mark.slow
def test_the_notebook_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(root()))
    page = nbformat.read(root() / "docs/notebook.ipynb", as_version=4)
    NotebookClient(page, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    outputs = [output for cell in page.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.get("text", "") for output in outputs)
    assert "did you mean steps?" in said
    assert "KL over all three tokens: 0.1167" in said
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_a_study_is_a_table_with_the_rows_of_its_report(tmp_path: Path) -> None:
    found = rlhf.results(write_sweep(tmp_path / "study"))
    assert len(found.runs) == 9
    assert found.runs.groupby("row").size().to_dict() == {
        "variant=full_none": 3, "variant=lora_kl": 3, "variant=lora_none": 3,
    }  # fmt: skip
    assert len(found.curves) == 9 * len(STEPS)
    assert len(found.outcomes) == 9 * len(STEPS) * PROMPTS
    last = found.outcomes[found.outcomes.step == STEPS[-1]]
    means = last.groupby(["row", "replicate"]).win.mean()
    recorded = found.runs.set_index(["row", "replicate"])["eval/win_rate"]
    assert means.to_dict() == pytest.approx(recorded.to_dict())


def test_mistakes_are_exceptions_with_the_sentence_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.stepz"):
        rlhf.compose(["ppo.stepz=3"])
    with pytest.raises(ConfigError, match=r"ppo\.steps=0 is not allowed"):
        rlhf.run(rlhf.compose(["ppo.steps=0", f"output_dir={tmp_path}"]))
    with pytest.raises(NoRunsError):
        rlhf.results(tmp_path)
    with pytest.raises(RunError, match="no such folder"):
        rlhf.load_policy(tmp_path / "nothing")
    with pytest.raises(AttributeError):
        _ = rlhf.composed
