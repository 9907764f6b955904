"""Table 2 measures what table 1 has trained."""

from omegaconf import OmegaConf

from rlhf.pipeline import identity
from rlhf.pipeline.config import data_source
from tests.helpers.composed_config import composed


def test_table_2_measures_the_runs_of_table_1() -> None:
    """Their configurations differ in nothing that is trained, so that `policy=finished` finds them."""
    first, second = (composed(f"experiments=table{number}", "variant=lora_kl", "replicate=2") for number in (1, 2))
    assert (second.stage.name, second.policy) == ("evaluate", "finished@ppo")
    source = data_source(first)
    trained = [identity.of_training({**OmegaConf.to_container(config, resolve=True), **same}, source)  # type: ignore[dict-item]
               for config in (first, second) for same in ({"stage": "", "name": "", "report": ""},)]  # fmt: skip
    assert trained[0] == trained[1]
    axes = [composed(f"experiments=table{number}", with_hydra=True).hydra.sweeper.params for number in (1, 2)]
    assert axes[0].replicate == axes[1].replicate
    assert set(axes[1].variant.split(",")) <= set(axes[0].variant.split(","))
