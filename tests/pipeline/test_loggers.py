"""The loggers beside metrics.jsonl hold the curves of every stage that a run builds, and TensorBoard the answers."""

import csv
from pathlib import Path

import pytest

from rlhf.files import SAMPLES, read_lines
from tests.helpers.command_line import TINY, run_in_process

FINAL = {"sft": "sft/loss", "reward": "reward/loss", "ppo": "ppo/reward"}


def folders(outputs: Path) -> dict[str, Path]:
    (run,) = {path.parent for path in outputs.glob("rlhf/*/summary.json")}
    return {**{stage: next(outputs.glob(f"cache/{stage}-*/")) for stage in ("sft", "reward")}, "ppo": run}


@pytest.mark.long
def test_csv_holds_the_curves_of_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_in_process(*TINY, "logger=csv") == 0
    for stage, folder in folders(tmp_path / "outputs").items():
        with (folder / "metrics.csv").open(encoding="utf-8") as file:
            values = [row[FINAL[stage]] for row in csv.DictReader(file)]
        logged = [line[FINAL[stage]] for line in read_lines(folder / "metrics.jsonl") if FINAL[stage] in line]
        assert [float(value) for value in values if value] == pytest.approx(logged)


@pytest.mark.long
def test_tensorboard_holds_the_curves_and_the_answers_of_every_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    assert run_in_process(*TINY, "logger=tensorboard") == 0
    texts: dict[int, str] = {}
    for stage, folder in folders(tmp_path / "outputs").items():
        values = []
        for path in (folder / "tensorboard").glob("events*"):
            events = loading.EventAccumulator(str(path))
            events.Reload()
            values += (
                [x.value for x in events.Scalars(FINAL[stage])] if FINAL[stage] in events.Tags()["scalars"] else []
            )
            for found in (
                events.Tensors("samples/text_summary") if "samples/text_summary" in events.Tags()["tensors"] else []
            ):
                texts[found.step] = found.tensor_proto.string_val[0].decode()
        logged = [line[FINAL[stage]] for line in read_lines(folder / "metrics.jsonl") if FINAL[stage] in line]
        assert values == pytest.approx(logged)
    samples = read_lines(folders(tmp_path / "outputs")["ppo"] / SAMPLES)
    assert set(texts) == {0, 3}
    assert all(f"    {line}" in texts[row["step"]] for row in samples for line in row["response"].splitlines())
