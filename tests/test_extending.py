"""docs/extending.md: the page's blocks are written to files, and its commands are run."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlhf import root
from rlhf.data.records import Prompt
from rlhf.files import SUMMARY, read_lines
from rlhf.stages.reference import Weights
from rlhf.tracking.metrics_file import read_metrics
from rlhf.tracking.summary import read_summary
from tests.helpers.calls import record_calls
from tests.helpers.command_line import TINY, run_in_process

pytestmark = pytest.mark.slow
PAGE = (root() / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split()[1:] for kind, text in BLOCKS for line in text.splitlines() if line.startswith("rlhf ")]


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Write the page's files below a new current folder and import `mine/parts.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("extending"))
        patch.syspath_prepend(".")
        for kind, text in BLOCKS:
            named = re.match(r"(?:# @package _global_\n)?# (mine/\S+)\n", text)
            if named:
                path = Path(named[1])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text((path.read_text() if path.exists() else "") + text)
            assert named or kind not in ("python", "yaml"), text
        yield importlib.import_module("mine.parts")
        for name in ("mine.parts", "mine"):
            sys.modules.pop(name)


def run(chosen: str) -> Path:
    """Run the page's command that ends with `chosen` at the smallest size; returns the new run's folder."""
    (words,) = [words for words in COMMANDS if " ".join(words).endswith(chosen)]
    tiny = [word for word in TINY if not word.startswith("data") or "data=" not in chosen]
    before = set(Path("outputs/rlhf").glob(f"*/{SUMMARY}"))
    assert run_in_process(*words, *tiny) == 0
    (made,) = set(Path("outputs/rlhf").glob(f"*/{SUMMARY}")) - before
    return made.parent


def test_a_divergence_of_the_page_trains() -> None:
    folder = run("divergence=huber divergence.width=0.5 kl.coef=0.05")
    lines = [line for line in read_metrics(folder) if "ppo/penalty" in line]
    assert len(lines) == 3
    # near the reference the penalty is δ²/2, which k3 equals to second order
    assert lines[-1]["ppo/penalty"] == pytest.approx(lines[-1]["ppo/k3"], rel=0.2)
    assert lines[-1]["ppo/penalty"] > 0


def test_an_advantage_estimator_of_the_page_trains(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = record_calls(monkeypatch, parts, "above_the_worst")
    folder = run("advantages=above_the_worst")
    assert len(batches) == 1 + 3  # tried once, then a call a step
    for (batch,), advantages in batches[1:]:
        returns = torch.where(batch.mask, batch.rewards, 0.0).sum(1)
        groups = returns.view(2, 4)  # two prompts, four answers to each
        expected = 2.0 * (groups - groups.amin(1, keepdim=True)).flatten()
        torch.testing.assert_close(advantages, torch.where(batch.mask, expected[:, None], 0.0))
    summary = read_summary(folder)
    assert summary is not None
    assert summary["config"]["ppo"]["value_model"] == "none"


def test_an_unknown_option_is_answered_with_ones_own(capfd: pytest.CaptureFixture) -> None:
    assert run_in_process("--config-dir", "mine/conf", "divergence=nothing") == 2
    said = capfd.readouterr().err
    assert "huber" in said
    assert "jensen_shannon" in said


def test_a_function_of_the_page_is_a_reward(parts: ModuleType) -> None:
    samples = read_lines(run("scorer.function=mine.parts.brevity") / "samples.jsonl")
    assert samples
    for row in samples:
        assert row["reward"] == pytest.approx(parts.brevity([row["prompt"]], [row["response"]])[0])


def test_a_scorer_of_the_page_has_parameters() -> None:
    samples = read_lines(run("scorer=length_near scorer.target=6") / "samples.jsonl")
    assert samples
    assert all(row["reward"] == pytest.approx(-abs(row["tokens"] - 6) / 10) for row in samples)


def test_a_loss_term_of_the_page_is_added() -> None:
    folder = run("loss_terms=[unlikely] loss_terms.unlikely.coef=0.2")
    values = [line["ppo/loss_unlikely"] for line in read_metrics(folder) if "ppo/loss_unlikely" in line]
    assert len(values) == 3
    assert all(value > 0 for value in values)


def test_a_judge_of_the_page_judges(parts: ModuleType) -> None:
    folder = run("judge=overlap")
    samples = [row for row in read_lines(folder / "samples.jsonl") if row["step"] == 3]
    prompts = [Prompt(row["prompt"], row["reference_output"]) for row in samples]
    outcomes = parts.Overlap(None)(prompts, [row["response"] for row in samples])
    assert [row["win"] for row in samples] == outcomes
    summary = read_summary(folder)
    assert summary is not None
    assert summary["metrics"]["eval/win_rate"] == sum(outcomes) / 4


def test_a_reference_rule_of_the_page_moves_the_reference(parts: ModuleType) -> None:
    lines = [line for line in read_metrics(run("reference=mean reference.begin=1")) if "ppo/k1" in line]
    assert [line["ppo/reference_moves"] for line in lines] == [0, 0, 1]
    assert [line["ppo/reference_k1"] == line["ppo/k1"] for line in lines] == [True, True, False]
    tensors = [torch.tensor([8.0])], [torch.tensor([2.0])], [torch.tensor([0.0])]
    parts.Mean().move(2, 0.0, Weights(*tensors))
    assert tensors[1][0].item() == 4  # two steps: a third of the third model, 2 + (8 − 2) / 3


def test_a_data_set_of_the_page_trains() -> None:
    folder = run("data=sums judge=gold")
    samples = read_lines(folder / "samples.jsonl")
    assert len(samples) == 2 * 4
    for row in samples:
        a, b = re.fullmatch(r"(\d) \+ (\d) =", row["prompt"]).groups()
        assert row["reference_output"] == f" {int(a) + int(b)}"
        assert row["gold_utility"] == (row["response"].strip() == row["reference_output"].strip())


@pytest.mark.long
def test_a_study_of_the_page_runs(capfd: pytest.CaptureFixture) -> None:
    (words,) = [words for words in COMMANDS if words[-1] == "experiments=short"]
    small = [*words, *TINY, "replicate=1"]  # the command line overrides the file
    assert run_in_process(*small) == 0
    assert len(list(Path("outputs/short").glob(f"*/{SUMMARY}"))) == 2
    report = Path("outputs/short/report")
    page = (report / "report.html").read_text()
    for label in ("Does a penalty keep answers long?", "length reward, Huber", "learned reward, KL"):
        assert label in page
    assert list((report / "figures").glob("length.*"))
    assert "win rate" in (report / "table.md").read_text()
    capfd.readouterr()
    assert run_in_process(*small, "dry_run=true") == 0
    assert "2 of 2 runs done" in capfd.readouterr().out


def test_no_command_of_the_page_is_forgotten() -> None:
    source = Path(__file__).read_text()
    ends = [words[-1] for words in COMMANDS]
    assert all(end in source for end in ends), ends
