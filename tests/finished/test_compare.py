"""`rlhf-compare` end to end: two farm runs with their SFT model and the references, and judges of other kinds."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest

from rlhf.data.records import Prompt, as_records
from rlhf.evaluation.judges import outcome
from rlhf.files import read_json, read_lines
from rlhf.finished.compare import cli
from rlhf.finished.compare.configuration import compose, split_words
from rlhf.finished.compare.duels import judge_all
from rlhf.finished.run import FinishedRun
from rlhf.pipeline.config import data_source
from rlhf.report.ranking import win_rate
from rlhf.scorers.reward_model import RewardModelScorer
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.llm_judges import shown_outputs
from tests.helpers.openai_server import serving

pytestmark = pytest.mark.slow
# a little more SFT than in TINY, and PPO with large steps, so that no two policies say the same
LARGER = [
    "data.demonstrations=1500",
    "sft.epochs=3",
    "generation.max_new_tokens=24",
    "evaluation.prompts=8",
    "ppo.lr=0.03",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The folders of two PPO runs on one SFT model, below the current folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("compare"))
        places = {}
        for seed, name in enumerate(("one", "two")):
            assert run_in_process(*TINY, *LARGER, f"name={name}", f"seed={seed}") == 0
            (made,) = Path("outputs", name).glob("*/summary.json")
            places[name] = Path(made.parent.rename(f"outputs/{name}/{name}"))
        yield SimpleNamespace(**places)


@pytest.fixture
def compare(
    runs: SimpleNamespace,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable:
    """Run `rlhf-compare` where nothing can be trained: (exit code, stdout, log and stderr)."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Hydra's, which write to stdout
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *_, **__: pytest.fail("a model is being trained"))

    def call(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured, logged = capsys.readouterr(), caplog.text
        caplog.clear()
        return code, captured.out, logged + captured.err

    return call


def folder_of(said: str) -> Path:
    return Path(said.splitlines()[-1])


def test_two_runs_their_sft_model_and_the_references_are_ranked(runs: SimpleNamespace, compare: Callable) -> None:
    """Every number follows from the answers and the farm's utility, which are computed here a second time."""
    cached = sorted(Path("outputs/cache").glob("*-*/"))
    code, said, log = compare(runs.one, runs.two, f"{runs.one}@sft", "reference")
    assert code == 0, log
    assert folder_of(said).parent == Path("outputs/comparisons")  # as the next command from here would name it
    found = read_json(folder_of(said) / "comparison.json")
    rows = read_lines(folder_of(said) / "answers.jsonl")
    labels = ["one", "two", "one@sft", "reference"]
    # 1. The answers are those that the runs' own evaluations recorded.
    for run, label in ((runs.one, "one"), (runs.two, "two")):
        assert [row["answers"][label] for row in rows] == [row["output"] for row in read_json(run / "alpaca_eval.json")]
    assert len({tuple(row["answers"][label] for row in rows) for label in labels}) == 4
    # 2. The win rates are those of their utilities.
    farm = data_source(compose([], FinishedRun.open(runs.one)))
    assert [row["answers"]["reference"] for row in rows] == list(farm.load("eval")["reference_output"])
    utility = {label: [farm.utility(row["prompt"], row["answers"][label]) for row in rows] for label in labels}
    assert len(found["pairs"]) == 6
    for pair in found["pairs"]:
        won = [outcome(*both, 0.0) for both in zip(utility[pair["first"]], utility[pair["second"]], strict=True)]
        expected = win_rate(np.array(won))
        assert {key: pair[key] for key in vars(expected)} == vars(expected)
        assert pair["consistency"] == 1.0
    # 3. The ranking is that of the mean win rates, as everybody has met everybody equally often.
    rates = {
        label: np.mean([p["rate"] if p["first"] == label else 1 - p["rate"]
                        for p in found["pairs"] if label in (p["first"], p["second"])])
        for label in labels
    }  # fmt: skip
    order = [one["label"] for one in found["players"]]
    assert [rates[label] for label in order] == sorted(rates.values(), reverse=True)
    assert order[0] == "reference"
    assert sum(one["strength"] for one in found["players"]) == pytest.approx(0, abs=1e-6)
    # 4. All of it is in files, nothing was built, and the same command does nothing.
    assert {path.name for path in folder_of(said).iterdir()} == {
        "answers.jsonl", "comparison.json", "comparison.md", "ranking.csv", "verdicts.jsonl", "win_rates.csv",
    }  # fmt: skip
    assert sorted(Path("outputs/cache").glob("*-*/")) == cached
    assert "one@sft answers 8 prompts" in log
    before = {path: path.stat().st_mtime_ns for path in folder_of(said).iterdir()}
    code, again, log = compare(runs.one, runs.two, f"{runs.one}@sft", "reference")
    assert (code, again) == (0, said)
    assert "has been made already" in log
    assert {path: path.stat().st_mtime_ns for path in folder_of(said).iterdir()} == before


def test_a_run_is_compared_in_its_own_data_and_another_judge_asks_no_model_again(
    runs: SimpleNamespace, compare: Callable
) -> None:
    """`data.eval_prompts=8` is the run's, the default is 200; its reward model scores each answer once."""
    reward = FinishedRun.open(runs.one).reward
    assert reward is not None
    compare(runs.one, runs.two, "judge=gold")
    with pytest.MonkeyPatch.context() as patch:
        scored = []
        original = RewardModelScorer.score

        def score(self: RewardModelScorer, batch: object) -> object:
            scores = original(self, batch)  # type: ignore[arg-type]
            scored.extend(scores.tolist())
            return scores

        patch.setattr(RewardModelScorer, "score", score)
        code, said, log = compare(
            runs.one, runs.two, "reference", "judge=finished_reward_model", f"judge.folder={reward.folder}"
        )
    assert code == 0, log
    assert log.count("its 8 answers are known") == 2
    assert len(scored) == 3 * 8
    found = read_json(folder_of(said) / "comparison.json")
    assert found["instructions"] == 8
    by_player = dict(zip(("one", "reference"), (scored[:8], scored[16:]), strict=True))  # one, two; then reference
    (pair,) = (row for row in found["pairs"] if (row["first"], row["second"]) == ("one", "reference"))
    won = [outcome(*both, 0.0) for both in zip(by_player["one"], by_player["reference"], strict=True)]
    assert pair["rate"] == pytest.approx(np.mean(won))


def longer(request: dict, number: int = 0) -> str:
    """A judge who prefers the longer output, and the one it sees first if they are equally long."""
    first, second = shown_outputs(request)
    return f"Final verdict: {'1' if len(first) >= len(second) else '2'}"


def endpoint(url: str) -> list[str]:
    """Overrides for a judge behind an endpoint, with one of the four prompts."""
    others = [f"~judge.pool.{name}" for name in ("criteria", "reasons", "crowd")]
    client = [f"judge.client.base_url={url}", "judge.client.api_key_env=null"]
    return ["judge=llm_pool", "judge.model=some", *client, *others]


def test_an_endpoint_is_asked_once_about_a_pair_and_an_order(runs: SimpleNamespace, compare: Callable) -> None:
    """An evaluation has asked about one order; the comparison asks about the other; a third player, only about it."""
    with serving(longer) as server:
        same = [*TINY, *LARGER, "name=asked", "stage=evaluate", "seed=0", *endpoint(server.url)]
        assert run_in_process(*same) == 0
        asked = len(server.requests)
        assert asked == 8
        code, said, log = compare(f"{runs.one}@sft", "reference", *endpoint(server.url))
        assert code == 0, log
        assert len(server.requests) == 16
        found = read_json(folder_of(said) / "comparison.json")
        assert (found["usage"]["judge/answers"], found["usage"]["judge/from_cache"]) == (16, 8)
        code, said, log = compare(f"{runs.one}@sft", "reference", runs.two, *endpoint(server.url))
        assert code == 0, log
        assert len(server.requests) == 16 + 2 * 2 * 8
    rows = read_lines(folder_of(said) / "answers.jsonl")
    lengths = {label: [len(row["answers"][label]) for row in rows] for label in ("one@sft", "two")}
    (pair,) = (row for row in read_json(folder_of(said) / "comparison.json")["pairs"]
               if {row["first"], row["second"]} == set(lengths))  # fmt: skip
    won = [outcome(*both, 0.0) for both in zip(lengths[pair["first"]], lengths[pair["second"]], strict=True)]
    assert pair["rate"] == pytest.approx(np.mean(won))  # who is first does not matter, as both orders were asked
    different = [a != b for a, b in zip(*lengths.values(), strict=True)]
    assert pair["consistency"] == pytest.approx(np.mean(different))


def test_a_judge_who_prefers_a_place_finds_ties() -> None:
    prompts = [Prompt(f"p{i}", "", f"p{i}") for i in range(4)]
    answers = [[f"{name}{i}" for i in range(4)] for name in "ab"]
    answers[1][3] = answers[0][3]  # the same answer is a tie, and nobody is asked
    asked: list[str] = []

    def first_place(rows: list[Prompt], responses: list[str]) -> list[float | None]:
        asked.extend(row.prompt for row in rows)
        return [None if row.prompt == "p2" and text == "a2" else 1.0 for row, text in zip(rows, responses, strict=True)]

    (duel,) = judge_all(first_place, prompts, answers)
    np.testing.assert_array_equal(duel.outcomes, [0.5, 0.5, np.nan, 0.5])  # without one of the orders: no verdict
    np.testing.assert_array_equal(duel.in_order, [1.0, 1.0, np.nan, 0.5])
    np.testing.assert_array_equal(duel.reversed, [0.0, 0.0, 0.0, 0.5])
    assert duel.consistency == pytest.approx(1 / 3)
    assert asked == ["p0", "p1", "p2"] * 2


def test_outputs_of_others_need_no_run(runs: SimpleNamespace, compare: Callable) -> None:
    """Without a run among the players, data and judge are those of the command line."""
    farm = ["data.eval_prompts=8", "data.people=12", "evaluation.prompts=8", "output_dir=elsewhere"]
    source = data_source(compose(farm, None))
    rows = as_records(source.load("eval"), "eval")
    Path("mine.json").write_text(
        json.dumps([{"instruction": row.instruction, "output": "No.", "generator": "nobody"} for row in rows])
    )
    code, said, log = compare("mine.json", "reference", *farm, "--out", "results")
    assert code == 0, log
    assert folder_of(said) == Path("results")
    found = read_json(Path("results/comparison.json"))
    assert [one["label"] for one in found["players"]] == ["reference", "nobody"]
    assert found["unanimous"] == ["nobody", "reference"]
    assert "“nobody” and “reference” won or lost every comparison, so that the strength is only a bound" in said
    # another comparison does not go where something is
    code, _, log = compare("mine.json", "reference", *farm, "evaluation.prompts=7", "--out", "results")
    assert code == 2
    assert "results exists already and holds something else; allowed: a new folder" in log
    assert read_json(Path("results/comparison.json")) == found


def test_a_dry_run_says_what_would_be_done(runs: SimpleNamespace, compare: Callable) -> None:
    code, said, log = compare(runs.one, runs.two, "reference", "evaluation.prompts=5", "--dry-run")
    assert code == 0, log
    first, _, third, judge, folder = said.splitlines()
    assert first == "one: would answer 5 prompts"
    assert third == "reference: its answers are known"
    assert judge == "GoldJudge would judge 3 pairs of players on 5 prompts in both orders: at most 30 comparisons"
    assert not Path(folder.removeprefix("would write ")).exists()


def test_words_are_players_or_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("outputs/seed=1").mkdir(parents=True)
    words = ["outputs/seed=1", "judge=gold", "us/model@main", "+judge.pool.mine={prompt: mine.txt}",
             "~judge.pool.crowd", "judge@preferences.judge=gold", "~/models/mine", "data/template=short"]  # fmt: skip
    players, overrides = split_words(words)
    assert players == ["outputs/seed=1", "us/model@main", "~/models/mine"]
    assert overrides == [word for word in words if word not in players]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{one}"], "1 player is nothing to compare; allowed: two or more"),
        (["{one}", "{one}"], "is named twice"),
        (["{one}", "nowhere"], "nowhere: there is no such file or folder"),
        (["{one}", "reference", "judge=none"], "judge=none compares nothing"),
        (["{one}", "reference", "judge=reward_model"], "allowed: judge=finished_reward_model"),
        (["{one}", "reference", "judge=golden"], "judge=golden: there is no such option, did you mean gold?; allowed:"),
        (["{one}", "reference", "evaluation.promts=3"], "evaluation.promts"),
        (["{one}", "reference", "evaluation.prompts=0"], "evaluation.prompts=0 is not allowed"),
        (["{one}", "reference", "judge=finished_reward_model", "judge.folder=x"], "judge.folder=x"),
        (["{one}", "reference", "evaluation.best_of=2", "evaluation.temperature=1"], "evaluation.best_of=2"),
        (["{one}", "reference", "data=imdb", "data.reviews=nowhere.jsonl"], "nowhere.jsonl"),
        (["{one}", "reference", "judge=llm_pool", "judge.model=x", "judge.client.base_url=http://localhost:9",
          "judge.client.api_key_env=null"], "judge.client"),
    ],
)  # fmt: skip
def test_mistakes_end_in_a_sentence_before_any_model_is_loaded(
    runs: SimpleNamespace, compare: Callable, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.finished.chat.models.load_causal_lm", lambda *_: pytest.fail("a model is loaded"))
    code, out, log = compare(*(word.format(**vars(runs)) for word in words))
    assert code == 2
    assert said in log.splitlines()[-1]
    assert log.splitlines()[-1].startswith("rlhf-compare: ")
    assert "Traceback" not in log
    assert not out
