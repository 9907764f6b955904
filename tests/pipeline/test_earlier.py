"""Different runs in one folder: none is deleted, each can be resumed."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.errors import ModelError
from rlhf.files import EARLIER, EVALUATIONS, KEPT, METRICS, MODEL, SUMMARY, write_json
from rlhf.pipeline import cache, earlier, measuring
from tests.helpers.composed_config import composed_plan


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


def write_run_files(
    folder: Path, identity: str, steps: int = 3, finished: bool = True, **config: Any
) -> dict[str, bytes]:
    """Write the files of a run and return their contents."""
    (folder / MODEL).mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".lock").touch()
    (folder / "cli.log").write_text("log\n")
    save_file({"weight": torch.tensor(list(identity.encode()))}, folder / MODEL / "adapter.safetensors")
    (folder / "checkpoints" / f"step-{steps:06d}.ckpt").write_bytes(b"weights")
    (folder / METRICS).write_text("".join(json.dumps({"step": step}) + "\n" for step in range(steps + 1)))
    config = {"ppo": {"steps": steps}, **config}
    earlier.note(folder, identity, config, [])
    if finished:
        write_json(folder / SUMMARY, {"identity": identity, "config": config, "stage": "ppo", "metrics": {}})
    return files_of(folder)


def said(weights: Path) -> str:
    """The identity that `write_run_files` encoded in the weights."""
    return bytes(load_file(weights)["weight"].tolist()).decode()


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of the current run in a folder, without earlier runs, hidden files and logs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and EARLIER not in path.relative_to(folder).parts
        and not path.relative_to(folder).parts[0].startswith(".") and path.suffix != ".log"
    }  # fmt: skip


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_moves_aside_whole_and_comes_back(outputs: Path, finished: bool) -> None:
    folder = outputs / "mine/default"
    first = write_run_files(folder, "aaa", finished=finished)
    earlier.settle(folder, "bbb", outputs, False, "it")
    assert files_of(folder) == {}
    assert files_of(folder / EARLIER / "aaa") == first
    second = write_run_files(folder, "bbb", steps=8)
    earlier.settle(folder, "aaa", outputs, False, "it")
    assert files_of(folder) == first
    assert files_of(folder / EARLIER / "bbb") == second
    assert not (folder / EARLIER / "aaa").exists()
    earlier.settle(folder, "bbb", outputs, False, "it")
    assert files_of(folder) == second


def test_the_run_of_this_configuration_stays(outputs: Path) -> None:
    folder = outputs / "mine/default"
    files = write_run_files(folder, "aaa")
    earlier.settle(folder, "aaa", outputs, False, "it")
    assert files_of(folder) == files
    assert not (folder / EARLIER).exists()


def test_starting_over_keeps_what_was_there_and_does_not_bring_it_back(outputs: Path) -> None:
    folder = outputs / "mine/default"
    kept = [write_run_files(folder, "aaa", steps=1)]
    for steps in (2, 3):
        earlier.settle(folder, "aaa", outputs, True, "it")
        kept.append(write_run_files(folder, "aaa", steps=steps))
    earlier.settle(folder, "aaa", outputs, False, "it")
    assert [files_of(path) for path in sorted((folder / EARLIER).iterdir())] == kept[:2]
    assert files_of(folder) == kept[2]


def test_a_run_that_left_no_note_is_kept_too(outputs: Path) -> None:
    folder = outputs / "mine/default"
    files = write_run_files(folder, "aaa")
    (folder / earlier.NOTE).unlink()
    write_json(folder / SUMMARY, {"stage": "ppo"})
    earlier.settle(folder, "bbb", outputs, False, "it")
    moved = files_of(folder / EARLIER / earlier.UNKNOWN)
    assert moved.keys() == files.keys()


@pytest.mark.parametrize("killed_after", range(6))
def test_a_kill_while_it_moves_loses_nothing(outputs: Path, killed_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever move is interrupted, in either direction, the next start completes it."""
    folder = outputs / "mine/default"
    first = write_run_files(folder, "aaa")
    replace = earlier.os.replace
    for identity, expected in (("bbb", {}), ("aaa", first)):
        moves = iter(range(killed_after))

        def dying(source: Path, target: Path, moves: Any = moves) -> None:
            if next(moves, None) is None:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(earlier.os, "replace", dying)
        with suppress(KeyboardInterrupt):
            earlier.settle(folder, identity, outputs, False, "it")
        monkeypatch.setattr(earlier.os, "replace", replace)
        earlier.settle(folder, identity, outputs, False, "it")
        assert files_of(folder) == expected
    assert not (folder / EARLIER / "aaa").exists()


def test_runs_that_share_its_model_go_on_sharing_it(outputs: Path) -> None:
    folder, other = outputs / "table/default", outputs / "figure/default"
    write_run_files(folder, "aaa")
    cache.register_run(outputs, "aaa", folder)
    cache.take_over(folder, other, {"name": "figure"}, [])
    weights = other / MODEL / "adapter.safetensors"
    assert said(weights) == "aaa"
    earlier.settle(folder, "bbb", outputs, False, "it")
    assert said(weights) == "aaa"
    assert cache.find_run(outputs, "aaa") == (folder / EARLIER / "aaa").resolve()
    earlier.note(other, "aaa", {}, [])
    earlier.settle(other, "ccc", outputs, False, "it")  # the link itself may be moved
    assert said(other / EARLIER / "aaa" / MODEL / "adapter.safetensors") == "aaa"
    earlier.settle(folder, "aaa", outputs, False, "it")
    assert said(other / EARLIER / "aaa" / MODEL / "adapter.safetensors") == "aaa"


def test_an_unfinished_copy_moves_aside_before_a_finished_run_is_taken_over(outputs: Path) -> None:
    """Its own policies, evaluations and notes would be taken for those of the finished run."""
    plan, found = composed_plan(outputs), outputs / "other/run"
    unfinished = write_run_files(plan.folder, plan.identity, steps=1, finished=False)
    for folder, run in ((plan.folder, "unfinished"), (found, "finished")):
        for place in (folder / KEPT / "step-000001", folder / EVALUATIONS / "abc"):
            place.mkdir(parents=True)
            (place / run).touch()
            unfinished |= {str((place / run).relative_to(folder)): b""} if folder == plan.folder else {}
    write_run_files(found, plan.identity)
    made = {"identity": plan.identity, "evaluation": "abc", "config": {}, "stage": "ppo", "metrics": {}}
    write_json(found / SUMMARY, made)
    weights = found / MODEL / "adapter.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1])
    with pytest.raises(ModelError, match="damaged: adapter"):
        measuring.take_over(plan, found)
    assert files_of(plan.folder) == unfinished  # it can still go on
    weights.write_bytes(before)
    measuring.take_over(plan, found)
    assert files_of(plan.folder / EARLIER / f"{plan.identity}-1") == unfinished
    for name in (MODEL, KEPT):
        assert (plan.folder / name).resolve() == found / name
    assert [path.name for path in (plan.folder / EVALUATIONS).rglob("*")] == ["abc", "finished"]
    assert not (plan.folder / "checkpoints").exists()
    assert plan.finished() == plan.folder


def test_the_message_about_a_move_names_the_differences(outputs: Path) -> None:
    folder = outputs / "mine/default"
    write_run_files(folder, "aaa", steps=3, name="mine")
    said = earlier.describe(folder, {"ppo": {"steps": 8}, "name": "other"}, ("name",))
    assert said == "the finished run with ppo.steps=3 instead of 8"
    same = earlier.describe(folder, {"ppo": {"steps": 3}, "name": "mine"})
    assert same == "the finished run of other data or other code"
    (folder / SUMMARY).unlink()
    said = earlier.describe(folder, {"ppo": {"steps": 8}}, ("name",))
    assert said == "the unfinished run (step 3) with ppo.steps=3 instead of 8"
