"""What a sweep and a run show on a real terminal, and what the log gets instead."""

import re
from pathlib import Path

import pytest

from rlhf.files import SUMMARY
from rlhf.sweep.live import SWEEP_LOG
from tests.helpers.command_line import TINY
from tests.helpers.terminals import on_terminal

MINE = """
from hydra.core.hydra_config import HydraConfig

def score(prompts, responses):
    if 'replicate=2' in HydraConfig.get().overrides.task:
        raise RuntimeError('the moon is full')
    return [len(response) / 100 for response in responses]
"""
LOGGED = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\]\[rlhf")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_shows_one_table_in_place_of_the_log_of_its_jobs(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    own = ["scorer=function", "scorer.function=mine.score", "ppo.steps=40", "ppo.eval_every=40", "name=study"]
    sweep = ["-m", *TINY, *own, "replicate=1,2", f"hydra/launcher={launcher}", "output_dir=outputs"]
    seen = on_terminal(tmp_path, sweep)
    assert seen.code == 1  # as without a terminal
    text = "\n".join(seen.lines)
    assert not [line for line in seen.lines if LOGGED.match(line)]
    assert re.search(r"running +replicate=1 +PPO \d+/40 +-?\d\.\d\d", text)
    assert "FAILED replicate=2: scorer.function=mine.score failed" in text
    assert re.search(r"log: outputs/study/\S+cli\.log", text)
    assert "1 of 2 runs done, 1 failed" in text
    table = [line for line in seen.lines if re.match(r"(running|failed|begun|outputs/study|\d of \d)", line)]
    assert max(map(len, table)) <= 80
    log = (tmp_path / "outputs/study" / SWEEP_LOG).read_text()
    assert LOGGED.search(log)
    assert "the moon is full" in log
    # with the table switched off, the jobs are heard
    said = on_terminal(tmp_path, [*sweep, "hydra.callbacks.sweep.live=false"])
    assert said.code == 1
    assert [line for line in said.lines if LOGGED.match(line)]


@pytest.mark.long
def test_ctrl_c_ends_a_sweep_with_what_goes_on(tmp_path: Path) -> None:
    typed: list[bytes] = []

    def keys() -> bytes:
        if typed or not list(tmp_path.glob("outputs/study/*/metrics.jsonl")):
            return b""
        typed.append(b"\x03")
        return b"\x03"

    steps = ["ppo.steps=400", "ppo.eval_every=400", "name=study", "output_dir=outputs"]
    seen = on_terminal(tmp_path, ["-m", *TINY, *steps, "replicate=1,2"], keys=keys)
    assert seen.code == 75
    text = "\n".join(seen.lines)
    assert "SIGINT: finishing the step, then saving and leaving" in text
    assert "stopped: 0 of 2 runs done, 1 begun, 1 waiting; the same command continues" in text
    assert "Traceback" not in text
    assert not list(tmp_path.glob(f"outputs/study/*/{SUMMARY}"))


@pytest.mark.long
def test_a_run_shows_a_line_for_each_stage_that_does_not_wrap(tmp_path: Path) -> None:
    seen = on_terminal(tmp_path, [*TINY, "ppo.steps=4", "ppo.eval_every=2", "name=one", "output_dir=outputs"])
    assert seen.code == 0
    for stage in (r"SFT 6/6 .*loss \d", r"reward model 4/4 .*loss \d", r"PPO 4/4 .*reward -?\d.*  win \d+%  KL \d"):
        found = [line for line in seen.lines if re.match(stage, line)]
        assert found, stage
        assert max(map(len, found)) < 80
    # the results last: their folder, and what to type next, each as one line
    (folder,) = {path.parent for path in tmp_path.glob(f"outputs/one/*/{SUMMARY}")}
    place = str(folder.relative_to(tmp_path))
    last = [line for line in seen.lines if line.strip()][-3:]
    assert last == [place, f"  rlhf-report {place}", f"  rlhf-chat {place}"]
