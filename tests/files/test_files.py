"""JSON-lines files torn by a kill or with odd characters, and checkpoints that are inspected only."""

import json
import logging
import os
from pathlib import Path

import pytest

from rlhf.errors import DamagedError
from rlhf.errors.explaining import explain
from rlhf.files import METRICS, keep_lines, read_json, read_lines, tidy, write_json
from rlhf.pipeline.checkpoints import Best, StepCheckpoints
from rlhf.sweep.states import states
from rlhf.tracking.dashboards import maybe_unsent
from rlhf.tracking.metrics_file import evaluated_at, forget_after, read_metrics


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    texts = ["a\u2028b", "c\x85d", "e\x0cf"]
    path.write_text("".join(json.dumps({"step": i, "text": t}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)))
    assert [line["text"] for line in read_lines(path)] == texts
    keep_lines(path, lambda line: line["step"] != 1)
    assert [line["text"] for line in read_lines(path)] == [texts[0], texts[2]]


def test_a_torn_line_is_ignored_and_a_broken_one_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n{"step": 4}')
    with caplog.at_level(logging.WARNING):
        assert [line["step"] for line in read_lines(path)] == [1, 3]
    assert f"{path}, line 2" in caplog.text
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("line", ["17", "[]", "null", '{"a": 1}', '{"step": "2"}', '{"step": null}', '{"step": true}'])
def test_a_foreign_line_is_named_and_left_out(line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1, "time/evaluate": 1.0, "eval/x": 0.5}\n' + line + '\n{"step": 2}\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert f"{path}, line 2" in caplog.text
    assert evaluated_at(tmp_path, 1) == {"time/evaluate": 1.0, "eval/x": 0.5}
    assert Best(tmp_path, "eval/x", "max").step() == 1
    forget_after(tmp_path, 1, evaluated=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_what_a_kill_may_have_kept_from_wandb_is_the_last_minute() -> None:
    lines = [{"step": step, "time": 1000.0 + 25 * step} for step in range(6)]
    assert [line["step"] for line in maybe_unsent(lines)] == [3, 4, 5]
    assert [line["step"] for line in maybe_unsent([{"step": 1}, {"step": 2}])] == [1, 2]
    assert maybe_unsent([]) == []


def test_what_a_killed_writer_left_goes_with_the_next_one_an_hour_later(tmp_path: Path) -> None:
    path = tmp_path / "abc.json"
    old, fresh, other = (tmp_path / name for name in (".abc.json.11", ".abc.json.12", ".abcd.json.13"))
    for torn in (old, fresh, other):
        torn.touch()
    for torn in (old, other):
        os.utime(torn, (0, 0))
    write_json(path, 1)
    assert sorted(tmp_path.iterdir()) == sorted([path, fresh, other])


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    for content in (b"", b"{", b"\xff\xfe", b"abc"):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match="is damaged: it is not JSON") as failure:
            read_json(path)
        assert explain(failure.value).startswith(str(path))


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path: Path) -> None:
    lines = [{"step": 0, "time/evaluate": 1.0, "eval/win_rate": 0.2}, {"step": 1, "ppo/k1": 0.1}]
    lines += [{"step": 2, "ppo/k1": 0.2}, {"step": 2, "time/evaluate": 1.0, "eval/win_rate": 0.3}, {"step": 3}]
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "pp')
    samples.write_text(json.dumps({"step": 2, "response": "x\u2028y"}, ensure_ascii=False) + "\n")
    assert evaluated_at(tmp_path, 2)["eval/win_rate"] == 0.3
    assert evaluated_at(tmp_path, 1) == {}
    forget_after(tmp_path, 2, evaluated=True)
    assert read_lines(metrics) == lines[:4]
    assert len(read_lines(samples)) == 1
    forget_after(tmp_path, 2, evaluated=False)
    assert read_lines(metrics) == lines[:3]
    assert read_lines(samples) == []


def test_a_torn_line_does_not_hide_a_sweeps_progress(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"runs": [{"folder": "a", "overrides": []}], "jobs": 1}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / METRICS).write_text('{"step": 7}\n{"step": 8, "ti')
    assert states(tmp_path)[0].step == 7


def test_looking_at_checkpoints_removes_none(tmp_path: Path) -> None:
    for step in (10, 20):
        (tmp_path / f"step-{step:06d}.ckpt").write_text("damaged")
    assert StepCheckpoints.reached(tmp_path) == 20
    assert len(list(tmp_path.iterdir())) == 2
    assert StepCheckpoints.reached(tmp_path / "none") == 0
    assert StepCheckpoints(tmp_path, 1).latest() is None
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_is_tidied_away_and_nothing_else(tmp_path: Path) -> None:
    kept = ["summary.json", ".lock", ".hydra.yaml", ".summary.json", "a.1"]
    for name in (*kept, ".summary.json.4711", ".metrics.jsonl.1"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
