"""What makes two measurements the same one, and two runs different ones."""

from pathlib import Path

from rlhf.pipeline import identity
from rlhf.pipeline.evaluating import question_template
from tests.helpers.composed_config import composed_plan


def test_a_reward_model_that_only_judges_is_a_part_of_what_is_measured(tmp_path: Path) -> None:
    for judge, counts in (("reward_model", True), ("gold", False)):
        one = composed_plan(tmp_path, "scorer=gold", f"judge={judge}")
        other = composed_plan(tmp_path, "scorer=gold", f"judge={judge}", "preferences=simulated")
        assert one.identity == other.identity
        assert one.reward_folder != other.reward_folder
        assert (one.evaluation != other.evaluation) == counts


def test_a_name_in_the_data_is_no_label() -> None:
    """It may choose a part of a set of the Hub."""
    one, other = ({"name": "run", "data": {"sft": {"path": "owner/set", "name": name}}} for name in ("one", "two"))
    assert identity.digest(identity.decisive(one)) != identity.digest(identity.decisive(other))
    assert identity.decisive(one) == identity.decisive({**one, "name": "other"})


def test_factscore_asks_in_the_form_of_the_data(tmp_path: Path) -> None:
    """Also where the data have no template: the farm's prompts end in a line break."""
    other = ["data=alpaca", "data/template=question_answer"]
    question = "Tell me a bio of Mira Keld."
    for words, prompt in (([], f"{question}\n"), (other, f"Question: {question}\n\nAnswer: ")):
        template = question_template(composed_plan(tmp_path, *words))
        assert template is not None
        assert template.render(question) == prompt
