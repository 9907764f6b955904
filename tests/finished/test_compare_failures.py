"""What goes wrong during a comparison ends in one sentence, and leaves nothing half-written."""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.farm import Farm
from rlhf.data.records import as_records
from rlhf.files import write_json
from rlhf.finished.compare import cli
from rlhf.finished.compare.duels import ConfiguredJudge
from rlhf.finished.compare.results import make_once
from tests.helpers.openai_server import serving

SIZES = ["data.eval_prompts=6", "data.people=12", "evaluation.prompts=6"]


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of outputs in a new current folder."""
    monkeypatch.chdir(tmp_path)
    rows = as_records(Farm(eval_prompts=6, people=12).load("eval"), "eval")
    for name in ("one", "two"):
        said = [{"instruction": row.instruction, "output": f"{name} {i}"} for i, row in enumerate(rows)]
        Path(f"{name}.json").write_text(json.dumps(said))


@pytest.fixture
def compare(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run `rlhf-compare` with the results in `results`: (exit code, the last line on stderr)."""

    def call(*words: str, out: str = "results") -> tuple[int, str]:
        code = 0
        try:
            cli.main([*words, *SIZES, "--out", out])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, next((line for line in reversed(said.splitlines()) if line.startswith("rlhf-compare: ")), "")

    return call


def left() -> set[str]:
    """What is in the current folder, besides the outputs of the fixture and the cache."""
    return {path.name for path in Path().iterdir()} - {"one.json", "two.json", "outputs"}


def test_a_player_under_another_spelling_is_the_same(compare: Callable) -> None:
    Path("link.json").symlink_to("one.json")
    for other in ("./one.json", "link.json"):
        assert compare("one.json", other) == (
            2, f"rlhf-compare: one.json and {other} are the same policy; allowed: each player once"
        )  # fmt: skip


def test_a_place_that_cannot_be_made_is_found_before_anything_is_judged(
    compare: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ConfiguredJudge, "__call__", lambda *_: pytest.fail("it judges"))
    code, said = compare("one.json", "two.json", out="one.json/results")
    assert (code, said.endswith("no folder can be made there (Not a directory); allowed: a place to write to")) == (
        2,
        1,
    )
    assert left() == set()


def test_an_interruption_leaves_nothing(compare: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        assert [name for name in left() if name.endswith(".unfinished")]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConfiguredJudge, "__call__", stop)
        assert compare("one.json", "two.json") == (130, "rlhf-compare: interrupted; the same command continues")
    assert left() == set()
    assert compare("one.json", "two.json") == (0, "")


def test_what_a_killed_command_left_is_removed_but_nothing_of_one_that_works(compare: Callable) -> None:
    gone, works = (Path(f".results.{process}.unfinished") for process in (2**22 + 1, os.getppid()))
    for folder in (gone, works):
        folder.mkdir()
    assert compare("one.json", "two.json") == (0, "")
    assert left() == {"results", works.name}


def test_an_endpoint_that_dies_half_way_is_asked_for_the_rest(compare: Callable) -> None:
    alive = 5
    judge = ["judge=llm_pool", "judge.model=some", "judge.client.api_key_env=null", "judge.client.retries=0",
             "judge.client.concurrency=1"]  # fmt: skip

    def answer(request: dict[str, Any], number: int) -> Any:
        return "Final verdict: 1" if number <= alive else (500, {"error": {"message": "gone"}})

    with serving(answer) as server:
        words = ["one.json", "two.json", *judge, f"judge.client.base_url={server.url}"]
        code, said = compare(*words)
        assert code == 75
        assert said.count("the same command continues") == 1
        assert left() == set()
        asked, alive = len(server.requests), 100
        assert compare(*words) == (0, "")
        assert len(server.requests) == asked + 12 - 5  # six pairs in both orders


def test_of_two_processes_at_once_one_makes_the_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun, made = threading.Event(), []

    def make(work: Path) -> None:
        made.append(work)
        begun.set()
        second.join(1)  # waits for the lock all the time
        assert second.is_alive()
        write_json(work / "comparison.json", {"identity": "this"})

    def again() -> None:
        assert begun.wait(30)
        make_once(tmp_path / "results", "comparison.json", "this", tmp_path / "cache", make)

    second = threading.Thread(target=again)
    second.start()
    with caplog.at_level(logging.INFO):
        make_once(tmp_path / "results", "comparison.json", "this", tmp_path / "cache", make)
        second.join(30)
    assert len(made) == 1
    assert "results has been made by another process" in caplog.text
