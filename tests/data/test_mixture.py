"""Several data sets as one: weights, order, counts, and what must agree between the parts."""

import pytest

from rlhf.data.farm import Farm
from rlhf.data.imdb import Imdb
from rlhf.data.mixture import Mixture
from rlhf.data.records import DataSource, ScoredComparison, as_records, columns, count_rows
from rlhf.errors import DataError
from tests.helpers.data_readers import TEMPLATE
from tests.helpers.hub_rows import hub


def demonstrations(name, count):
    return [{"prompt": f"{name} {i}", "completion": "x"} for i in range(count)]


def part(root, name, count, **more):
    (root / name).mkdir(exist_ok=True)
    return hub(root / name, sft=demonstrations(name, count), **more)


def names(rows):
    return [prompt.split()[1] for prompt in rows["prompt"]]  # "Q: a 0\nA:"


def test_parts_are_mixed_by_weight_and_evenly_spread(tmp_path):
    mixture = Mixture(parts={"a": part(tmp_path, "a", 30), "b": part(tmp_path, "b", 12)}, weights={"a": 1, "b": 2})
    assert isinstance(mixture, DataSource)
    rows = mixture.load("sft")
    assert mixture.report["sft"].rows == {"a": 6, "b": 12}
    assert all(sorted(names(rows)[i : i + 3]) == ["a", "b", "b"] for i in range(0, 18, 3))
    assert [prompt for prompt in rows["prompt"] if "b" in prompt] == [f"Q: b {i}\nA:" for i in range(12)]
    assert rows.to_list() == mixture.load("sft").to_list()
    assert rows.column_names == columns("sft")


def test_without_weights_all_rows_are_used_and_with_repeat_no_row_is_left_out(tmp_path):
    parts = {"a": part(tmp_path, "a", 9), "b": part(tmp_path, "b", 3, sft_validation=demonstrations("v", 2))}
    assert sorted(names(Mixture(parts=parts).load("sft"))) == ["a"] * 9 + ["b"] * 3
    mixture = Mixture(parts=parts, weights={"a": 1, "b": 1}, repeat=True)
    mixture.check()
    rows = mixture.load("sft")
    assert sorted(names(rows)) == ["a"] * 9 + ["b"] * 9
    assert len(set(rows["prompt"])) == 12
    assert len(mixture.load("sft_validation")) == 2  # of one part alone
    only = Mixture(parts=parts, weights={"a": 0, "b": 1}, max_rows=2)
    assert names(only.load("sft")) == ["b"] * 2


def test_repeated_rows_are_never_held_out(tmp_path):
    parts = {"a": part(tmp_path, "a", 9), "b": part(tmp_path, "b", 3)}
    with pytest.raises(DataError, match=r"^data\.repeat=true: rows held out from sft could also be trained on"):
        Mixture(parts=parts, weights={"a": 1, "b": 1}, repeat=True).check()


def test_each_part_counts_its_bad_rows_and_evaluation_prompts_of_any_part_are_excluded(tmp_path):
    (tmp_path / "a").mkdir()
    a = hub(tmp_path / "a", sft=[*demonstrations("a", 3), {"prompt": "", "completion": "x"}])
    b = part(tmp_path, "b", 2, eval=[{"prompt": "A  1", "reference": "x"}])
    mixture = Mixture(parts={"a": a, "b": b})
    assert sorted(mixture.load("sft")["prompt"]) == ["Q: a 0\nA:", "Q: a 2\nA:", "Q: b 0\nA:", "Q: b 1\nA:"]
    assert mixture.report["sft"].counts == {"a: empty `prompt`": 1, "a: prompt is in the evaluation set": 1}
    assert mixture.load("eval")["reference_output"] == ["x"]


def test_comparisons_with_and_without_a_margin_go_together(tmp_path):
    pair = {"prompt": "?", "chosen": "a", "rejected": "b"}
    for name in "ab":
        (tmp_path / name).mkdir()
    scored = hub(tmp_path / "a", preference_validation=[pair | {"score_chosen": 3, "score_rejected": 1}])
    mixture = Mixture(parts={"a": scored, "b": hub(tmp_path / "b", preference_validation=[pair | {"prompt": "!"}])})
    records = as_records(mixture.load("preference_validation"), "preference_validation")
    assert records == [ScoredComparison("Q: ?\nA:", "a", "b", 2.0), ScoredComparison("Q: !\nA:", "a", "b", None)]
    assert mixture.kinds() == ["a", "b"]


def test_comparisons_with_and_without_votes_go_together(tmp_path):
    farm = Farm(responses=8, comparisons=28, annotations=3)
    pair = {"prompt": "?", "chosen": "a", "rejected": "b"}
    rows = Mixture(parts={"farm": farm, "b": hub(tmp_path, preference=[pair])}).load("preference")
    assert count_rows(rows, "preference") == len(as_records(rows, "preference")) == 28 * 3 + 1


def test_what_does_not_fit_together_is_refused(tmp_path):
    a, b = part(tmp_path, "a", 3), part(tmp_path, "b", 30, template=TEMPLATE | {"without_input": "{instruction}"})
    with pytest.raises(
        DataError, match=r"^data\.parts\.b\.template is not data\.parts\.a\.template; allowed: the same"
    ):
        Mixture(parts={"a": a, "b": b})
    with pytest.raises(DataError, match=r"^data\.parts\.a\.template is not data\.template"):
        Mixture(parts={"a": a}, template={"with_input": "{instruction}{input}", "without_input": "{instruction}"})
    reviews = Imdb(reviews="x.csv", shares={"sft": 1}, root=str(tmp_path))
    assert Mixture(parts={"reviews": reviews, "a": a}).template == a.template  # one without a template has no say
    with pytest.raises(DataError, match=r"^data\.parts\.reviews: data\.reviews: .*x\.csv does not exist"):
        Mixture(parts={"reviews": reviews}).check()
    with pytest.raises(DataError, match=r"^no part of the mixture has eval; allowed: sft\.$"):
        Mixture(parts={"a": a}).load("eval")
    many = part(tmp_path, "c", 1)
    with pytest.raises(DataError, match=r"^sft: by the weights there is no row of c \(3 × a, 1 × c\)"):
        Mixture(parts={"a": a, "c": many}, weights={"a": 1, "c": 0.1}).load("sft")


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": -1}, {"a": 0, "b": 0}, {"a": 1, "b": 1, "c": 1}, [1, 2]])
def test_malformed_weights_are_refused(tmp_path, weights):
    parts = {name: part(tmp_path, name, 1) for name in "ab"}
    with pytest.raises(DataError, match="is not allowed; allowed: null, or a number from 0 for each of a, b"):
        Mixture(parts=parts, weights=weights)


@pytest.mark.parametrize("parts", [None, {}, [], {"a": {"root": "."}}])
def test_parts_must_be_data_sets(parts):
    with pytest.raises(DataError, match=r"^data\.parts is not a mapping from names to data sets"):
        Mixture(parts=parts)
