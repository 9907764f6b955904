"""What makes two measurements the same one, and two runs different ones."""

from pathlib import Path

from rlhf.pipeline import identity
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
