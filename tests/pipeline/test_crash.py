"""Real processes are killed; after the same command again, all results are those of an undisturbed run, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.helpers import killed_runs
from tests.helpers.command_line import TINY
from tests.helpers.run_results import STAGE_FOLDERS, assert_identical, collect_results

pytestmark = pytest.mark.long
KILLS = int(os.environ.get("RLHF_KILLS", "0"))  # number of additional kills at random moments
COMMAND = [
    *TINY, "logger=csv", "seed=1", "ppo.steps=10", "ppo.eval_every=2", "ppo.checkpoint_every=3",
    "ppo.keep_best=eval/true_kl", "ppo.keep_best_mode=min",
]  # fmt: skip

# a name, the moment (see killed_runs.py), at which of its occurrences the signal comes, and how many seconds later
SFT, REWARD, RUN = "*/.sft-*.building", "*/.reward-*.building", "*/outputs/rlhf/*"
MOMENTS: list[tuple[str, str, int, float]] = [
    ("SFT: an update", "rlhf.stages.base:Stage.accumulate", 2, 0),
    ("SFT: a checkpoint begun", f"write {SFT}/checkpoints/.step-*.ckpt.[0-9]*", 1, 0),
    ("SFT: a checkpoint written", f"rename {SFT}/checkpoints/step-*.ckpt", 1, 0),
    ("SFT: the last validation", "rlhf.stages.sft:SupervisedFineTuning.on_validation_epoch_end", 1, 0),
    ("SFT: the model", "rlhf.pipeline.builders.sft:save_model", 1, 0),
    ("SFT: the model, half-way", "rlhf.pipeline.builders.sft:save_model", 1, 0.005),
    ("SFT: the checksums", f"rename {SFT}/checksums.json", 1, 0),
    ("SFT: the summary", f"rename {SFT}/summary.json", 1, 0),
    ("SFT: into the cache", "rename */cache/sft-*", 1, 0),
    ("reward: an update", "rlhf.stages.base:Stage.accumulate", 1, 0.005),
    ("reward: a checkpoint begun", "rlhf.pipeline.checkpoints:StepCheckpoints.save", 1, 0.002),
    ("reward: a checkpoint written", f"rename {REWARD}/checkpoints/step-*.ckpt", 1, 0),
    ("reward: the last validation", "rlhf.stages.reward:RewardModeling.on_validation_epoch_end", 1, 0),
    ("reward: the baseline", "rlhf.stages.reward:RewardModeling.baseline", 1, 0),
    ("reward: the model", "rlhf.pipeline.builders.reward:save_adapter", 1, 0),
    ("reward: the summary", f"rename {REWARD}/summary.json", 1, 0),
    ("reward: into the cache", "rename */cache/reward-*", 1, 0),
    ("evaluation of SFT", "rlhf.stages.ppo:PPO.validation_step", 1, 0),
    ("evaluation of SFT: samples", f"write {RUN}/samples.jsonl", 1, 0),
    ("the first rollout", "rlhf.stages.ppo:rollout", 1, 0.02),
    ("an update", "rlhf.stages.base:Stage.accumulate", 3, 0),
    ("a checkpoint begun", f"write {RUN}/checkpoints/.step-*.ckpt.[0-9]*", 1, 0),
    ("a checkpoint half-written", "rlhf.pipeline.checkpoints:StepCheckpoints.save", 1, 0.002),
    ("a checksum written", f"rename {RUN}/checkpoints/step-*.sha256", 1, 0),
    ("a checkpoint written", f"rename {RUN}/checkpoints/step-*.ckpt", 1, 0),
    ("evaluation", "rlhf.stages.ppo:PPO.validation_step", 1, 0.02),
    ("evaluation: metrics", "rlhf.stages.ppo:PPO.emit", 1, 0),
    ("evaluation: samples", f"write {RUN}/samples.jsonl", 1, 0),
    ("evaluation: outcomes", f"write {RUN}/outcomes.jsonl", 1, 0),
    ("evaluation: the export", f"rename {RUN}/alpaca_eval.json", 1, 0),
    ("what is forgotten", f"rename {RUN}/metrics.jsonl", 1, 0),
    ("a rollout", "rlhf.stages.ppo:rollout", 1, 0.02),
    ("scores", "rlhf.stages.ppo:PPO.make_experience", 1, 0.01),
    ("an update, half-way", "rlhf.stages.ppo:PPO.update", 1, 0.02),
    ("an old checkpoint", f"remove {RUN}/checkpoints/step-*.ckpt", 1, 0),
    ("an old checksum", f"remove {RUN}/checkpoints/step-*.sha256", 1, 0),
    ("the model", "rlhf.pipeline.run:save_adapter", 1, 0),
    ("the best model", "rlhf.pipeline.run:save_adapter", 2, 0),
    ("the checksums", f"rename {RUN}/checksums.json", 1, 0),
    ("the summary", f"rename {RUN}/summary.json", 1, 0),
    ("the register", "rename */cache/runs/*.json", 1, 0),
    ("the report", "rlhf.report.cli:_make", 1, 0),
    ("the report: a table", "write */report/table.md", 1, 0),
    ("the report: figures", "rlhf.report.cli:make_figures", 1, 0.2),
    ("the report: its page", "write */report/report.html", 1, 0),
]  # fmt: skip
# what else a run has with several reward models and a reference that moves
MORE = ["scorer=ensemble", "scorer.members=2", "reference=reset", "reference.every=2", "kl=adaptive"]
MORE_MOMENTS: list[tuple[str, str, int, float]] = [
    ("the first member: into the cache", "rename */cache/reward-*", 1, 0),
    ("the second member: an update", "rlhf.stages.base:Stage.accumulate", 1, 0.005),
    ("the second member: a checkpoint", f"rename {REWARD}/checkpoints/step-*.ckpt", 1, 0),
    ("the second member: its summary", f"rename {REWARD}/summary.json", 1, 0),
    ("both are there", "rlhf.pipeline.run:load_roles", 1, 0),
    ("what computes is noted", f"rename {RUN}/sessions.json", 1, 0),
    ("the first average", "rlhf.stages.reference:Weights.blend", 1, 0),
    ("a checkpoint: its time", f"rename {RUN}/sessions.json", 2, 0),
    ("a reset", "rlhf.stages.reference:Weights.reset", 1, 0),
    ("after a checkpoint, an evaluation", "rlhf.stages.ppo:PPO.on_validation_epoch_start", 1, 0),
    ("half of it", "rlhf.stages.ppo:PPO.on_validation_epoch_end", 1, 0),
    ("after a reset", "rlhf.stages.ppo:PPO.update", 2, 0.01),
    ("after the last evaluation", "rlhf.pipeline.checkpoints:StepCheckpoints.prune", 1, 0),
    ("before the summary", "rlhf.pipeline.run:write_summary", 1, 0),
]  # fmt: skip
KILLED = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (-signal.SIGTERM, 75), signal.SIGUSR1: (75,)}


def arguments(folder: Path, more: Sequence[str] = ()) -> list[str]:
    return ["-m", *COMMAND, *more, f"output_dir={folder}/outputs"]


def to_the_end(folder: Path, more: Sequence[str] = ()) -> str:
    """Run the command in the usual way to its end; return its output."""
    command = [sys.executable, "-m", "rlhf", *arguments(folder, more)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def kill_at(
    folder: Path, where: str, nth: int, seconds: float, number: signal.Signals, more: Sequence[str] = ()
) -> bool:
    """Run the command and kill it at a moment; False if the run ended before."""
    log = folder / "died.log"
    log.unlink(missing_ok=True)
    process = killed_runs.start(folder, arguments(folder, more), where, nth, seconds, number)
    process.join()
    expected = KILLED[number] if log.exists() else (0,)
    assert process.exitcode in expected, (where, number, process.exitcode, (folder / "said.log").read_text())
    return log.exists()


def kill_after(folder: Path, seconds: float, number: signal.Signals, more: Sequence[str] = ()) -> bool:
    """Run the command and kill it after `seconds`; False if the run ended before."""
    process = killed_runs.start(folder, arguments(folder, more))
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid or 0, number)
        process.join()
    expected = (0, *KILLED[number])  # it may have ended just before
    assert process.exitcode in expected, (seconds, number, process.exitcode, (folder / "said.log").read_text())
    return process.exitcode != 0


class Lives:
    """Runs one after another, each killed repeatedly; when one ends, it is compared with an undisturbed run."""

    def __init__(self, folder: Path, undisturbed: dict[str, Any], more: Sequence[str] = ()):
        self.root, self.undisturbed, self.more = folder, undisturbed, more
        self.kills: Counter[str] = Counter()
        self.compared = 0
        self._begin()

    def _begin(self) -> None:
        self.folder = self.root / str(self.compared)
        self.folder.mkdir()

    def killed(self, what: str, number: signal.Signals) -> None:
        self.kills[f"{number.name}: {what}"] += 1
        print(f"{time.strftime('%X')} {number.name}: {what}", flush=True)

    def ended(self) -> None:
        """Compare the results of the finished run, then start a new one."""
        assert_identical(collect_results(self.folder), self.undisturbed)
        shutil.rmtree(self.folder)
        self.compared += 1
        self._begin()

    def end(self) -> None:
        assert not kill_after(self.folder, 9999, signal.SIGKILL, self.more)
        self.ended()
        print(f"\n{self.kills.total()} kills, {self.compared} runs compared, no difference")
        for what, times in sorted(self.kills.items()):
            print(f"{times:4} {what}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    to_the_end(folder)
    found = collect_results(folder)
    assert (
        len([name for name in found if "adapter_model.safetensors" in name]) == 3
    )  # reward model, last and best policy
    assert len([name for name in found if name.endswith(".ckpt")]) == 2
    assert {"report/table.md", "report/table.csv"} <= found.keys()
    assert found["torn"] == []
    return found


@pytest.mark.parametrize(
    "first",
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.skipif(not KILLS, reason="RLHF_KILLS is not set"))],
    ids=["kill", "terminate"],
)
def test_killed_at_every_moment_a_run_ends_with_the_same_bits(
    undisturbed: dict[str, Any], tmp_path: Path, first: signal.Signals
) -> None:
    """All moments in order, alternately with SIGKILL and SIGTERM; with the other parameter the other way round."""
    lives = Lives(tmp_path, undisturbed)
    signals = sorted((signal.SIGKILL, signal.SIGTERM), key=lambda number: number != first)
    kill_at_each(lives, MOMENTS, signals)


def kill_at_each(
    lives: Lives, moments: Sequence[tuple[str, str, int, float]], signals: Sequence[signal.Signals]
) -> None:
    """Kill a run at all moments in order, with one signal after the other."""
    for i, (what, where, nth, seconds) in enumerate(moments):
        number = signals[i % len(signals)]
        if not kill_at(lives.folder, where, nth, seconds, number, lives.more):  # the run is past this moment already
            lives.ended()
            assert kill_at(lives.folder, where, nth, seconds, number, lives.more), f"this moment never comes: {what}"
        lives.killed(what, number)
    lives.end()


def test_killed_with_several_reward_models_and_a_reference_that_moves_a_run_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    (tmp_path / "undisturbed").mkdir()
    to_the_end(tmp_path / "undisturbed", MORE)
    kill_at_each(Lives(tmp_path, collect_results(tmp_path / "undisturbed"), MORE), MORE_MOMENTS, [signal.SIGKILL])


@pytest.mark.skipif(not KILLS, reason="RLHF_KILLS is not set")
def test_killed_at_random_a_run_ends_with_the_same_bits(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    lives, random = Lives(tmp_path, undisturbed), Random(KILLS)
    started = time.monotonic()
    assert not kill_after(lives.folder, 9999, signal.SIGKILL)
    longest = time.monotonic() - started
    lives.ended()
    while lives.kills.total() < KILLS:
        number = random.choice((signal.SIGKILL, signal.SIGTERM))
        if kill_after(lives.folder, random.uniform(0, longest), number):
            done = [
                name
                for name, place in STAGE_FOLDERS.items()
                if list(lives.folder.glob(f"outputs/{place}/summary.json"))
            ]
            lives.killed(f"at random, {' and '.join(done) or 'nothing'} being there", number)
        else:
            lives.ended()
    lives.end()


def test_a_damaged_checkpoint_is_passed_over(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    assert kill_at(tmp_path, "rlhf.stages.ppo:PPO.update", 4, 0, signal.SIGUSR1)
    newest = sorted(tmp_path.glob("outputs/rlhf/*/checkpoints/step-*.ckpt"))[-1]
    assert newest.name == "step-000004.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    said = to_the_end(tmp_path)
    assert "is damaged" in said
    assert "continuing from step 3" in said
    assert_identical(collect_results(tmp_path), undisturbed)
