"""`rlhf-agreement`: the farm's annotator against gold, an endpoint against annotations, a judge against another."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from rlhf.data.farm import Farm
from rlhf.evaluation.preferences import Simulated
from rlhf.files import read_json, read_lines
from rlhf.finished.compare import agreement
from rlhf.finished.compare.annotations import read_annotations
from tests.helpers.llm_judges import shown_outputs
from tests.helpers.openai_server import serving

FARM = ["data.demonstrations=10", "data.prompts=10", "data.eval_prompts=8"]
NOISE = 0.25


@pytest.fixture
def measure(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run `rlhf-agreement` in a new folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            agreement.main([str(word) for word in words])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def found_in(said: str) -> dict[str, dict]:
    """The agreements of a command's output, by the two judges."""
    found = read_json(Path(said.splitlines()[-1]) / "agreement.json")
    return {" - ".join(one["between"]): one for one in found["agreement"]}


def test_the_farms_annotator_agrees_with_gold_as_often_as_its_noise_allows(measure: Callable) -> None:
    """If p of the verdicts are right and a share ε is flipped, p (1 − ε) + (1 − p) ε of the labels are right."""
    shares = {}
    for noise in (0.0, NOISE):
        code, said, log = measure("preference", *FARM, "data.comparisons=3000", f"data.label_noise={noise}")
        assert code == 0, log
        shares[noise] = found_in(said)["judge - annotations"]
    right = shares[0.0]["decided"][0]
    assert 0.8 < right < 0.95  # it overlooks false facts and likes length
    share, low, high = shares[NOISE]["decided"]
    assert low < right * (1 - NOISE) + (1 - right) * NOISE < high
    # sides are drawn evenly, so that chance is ½ and κ = 2 p − 1, but for the few ties of the gold judge
    assert shares[NOISE]["kappa"][0] == pytest.approx(2 * share - 1, abs=0.03)
    code, said, _ = measure("preference_validation", *FARM, "data.held_out_comparisons=400")
    assert code == 0
    assert found_in(said)["judge - annotations"]["pairs"] == 400


def test_a_dry_run_says_what_would_be_judged(measure: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["preference", *FARM, "data.comparisons=20", "--pairs", 5]
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "_make", lambda *_: pytest.fail("it judges"))
        code, said, log = measure(*words, "--dry-run")
    assert code == 0, log
    judge, place = said.splitlines()
    assert judge == "GoldJudge would judge 5 pairs"
    folder = Path(place.removeprefix("would write "))
    assert not folder.exists()
    assert measure(*words)[1].splitlines()[-1] == str(folder)
    assert measure(*words, "--dry-run")[1].splitlines() == [f"{folder} has been made already"]
    assert measure("preference", *FARM, "judge=none", "--dry-run")[0] == 2


def test_simulated_preferences_agree_with_their_judge_but_for_the_flips(measure: Callable, tmp_path: Path) -> None:
    """The labels of gold's own verdicts: exactly the flipped ones disagree."""
    farm = Farm(demonstrations=10, prompts=10, eval_prompts=8, comparisons=400)
    simulated = Simulated(judge={"_target_": "rlhf.evaluation.judges.GoldJudge"}, pairs=10, validation_pairs=1,
                          max_new_tokens=8, flip=NOISE, seed=3)  # fmt: skip
    pairs = []
    for i, row in enumerate(farm.load("preference")):
        first, second = (row["chosen"], row["rejected"])[:: 1 if i % 2 else -1]
        utilities = [farm.utility(row["prompt"], text) for text in (first, second)]
        won = 0.5 if utilities[0] == utilities[1] else float(utilities[0] > utilities[1])
        pairs.append(simulated.label(str(i), row["prompt"], first, second, won, NOISE))
    path = tmp_path / "preference_pairs.jsonl"
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    code, said, log = measure(path, *FARM)
    assert code == 0, log
    found = found_in(said)["judge - annotations"]
    kept = [pair for pair in pairs if not pair.dropped]
    flipped = sum(pair.flipped for pair in kept)
    assert found["decided"][0] == pytest.approx(1 - flipped / len(kept))
    assert 0.15 < flipped / len(kept) < 0.35
    assert found["ties"][0] == found["ties"][1] == sum(pair.dropped == "tie" for pair in pairs) > 0


def annotations(count: int) -> list[dict]:
    """Pairs in AlpacaFarm's format; the annotator prefers the longer output in three of four, output_2 in the last."""
    rows = []
    for i in range(count):
        outputs = ("yes", "a longer answer") if i % 2 else ("a longer answer", "yes")
        longest = 1 + i % 2
        rows.append({
            "instruction": f"Task {i}", "input": "" if i % 3 else "given", "output_1": outputs[0],
            "output_2": outputs[1], "annotator": "a", "preference": longest if i % 4 else 3 - longest,
        })  # fmt: skip
    return rows


def test_an_endpoint_is_held_against_annotations(measure: Callable, tmp_path: Path) -> None:
    """A judge who prefers the longer output agrees with these annotations in 30 of 40 cases."""

    def longer(request: dict, number: int = 0) -> str:
        first, second = shown_outputs(request)
        return f"Verdict: {'1' if len(first) > len(second) else '2'}"

    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations(40)))
    with serving(longer) as server:
        words = [path, "judge=llm_pool", "judge.model=some", f"judge.client.base_url={server.url}",
                 "judge.client.api_key_env=null", "~judge.pool.criteria", "~judge.pool.reasons",
                 "~judge.pool.crowd"]  # fmt: skip
        code, said, log = measure(*words)
        assert code == 0, log
        assert len(server.requests) == 40
        found = found_in(said)
        for pair in ("judge - annotations", "longer answer - annotations"):
            assert found[pair]["accuracy"][0] == 0.75
            # the annotator prefers output_1 in 10 of 40 cases, the judge in 20: chance is ¼ · ½ + ¾ · ½
            assert found[pair]["kappa"][0] == pytest.approx((0.75 - 0.5) / 0.5)
        assert found["judge - longer answer"]["accuracy"][0] == 1.0
        assert measure(*words)[1] == said  # done already
        assert len(server.requests) == 40
        assert measure(*words, "--pairs", 10)[0] == 0
        assert len(server.requests) == 40  # from the cache
    rows = read_lines(Path(said.splitlines()[-1]) / "verdicts.jsonl")
    assert rows[0] == {
        "instruction": "Task 0\n\ngiven", "first": "a longer answer", "second": "yes", "annotations": 0.0,
        "judge": 1.0, "longer answer": 1.0,
    }  # fmt: skip


def test_preferences_are_read_on_alpacafarms_scale(tmp_path: Path) -> None:
    row = {"instruction": "i", "output_1": "a", "output_2": "b"}
    given = [1, 2, 0, 1.5, 1.25, "2", None, ""]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{**row, "preference": value} for value in given]))
    read = read_annotations(str(path), Farm(eval_prompts=2))
    assert [pair.outcome for pair in read] == [1.0, 0.0, 0.5, 0.5, 0.75, 0.0, None, None]
    assert (read[0].first, read[0].prompt.reference_output) == ("a", "b")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.json"], "nowhere.json: there are no annotations; allowed: preference or preference_validation"),
        (["rows.json"], "rows.json, row 1: it is no annotation of two outputs"),
        (["same.json"], "same.json has no pair of two different answers"),
        (["open.json"], "open.json has no verdict on any pair"),
        (["preference", "preference_validation"], "2 files of annotations are named; allowed: one"),
        (["preference", "--pairs", "0"], "--pairs 0 is not allowed; allowed: a whole number above 0"),
        (["preference", "judge=none"], "judge=none compares nothing"),
        (["preference", "data=imdb"], "only data=farm has"),
    ],
)
def test_mistakes_end_in_a_sentence(measure: Callable, words: list[str], said: str) -> None:
    task = Farm(eval_prompts=2).load("eval")[0]["prompt"]
    row = {"instruction": task, "output_1": "a", "output_2": "b"}
    Path("rows.json").write_text(json.dumps([{**row, "preference": 7}]))
    Path("same.json").write_text(json.dumps([{**row, "output_2": "a", "preference": 1}]))
    Path("open.json").write_text(json.dumps([{**row, "preference": None}]))
    code, out, log = measure(*words)
    assert code == 2
    assert said in log.splitlines()[-1]
    assert log.splitlines()[-1].startswith("rlhf-agreement: ")
    assert not out
    assert not list(Path("outputs").glob("agreements/*"))
