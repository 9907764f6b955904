"""What a finished run was trained with is measured as it was, also by a command with other options."""

from pathlib import Path

from omegaconf import OmegaConf

from rlhf.finished.as_trained import as_trained
from rlhf.finished.run import FinishedRun
from tests.helpers.composed_config import composed
from tests.helpers.finished_runs import finished_outputs


def test_a_run_keeps_the_parameters_of_its_divergence(tmp_path: Path) -> None:
    trained = FinishedRun.open(finished_outputs(tmp_path / "outputs").ppo)
    for own, other in (("divergence=alpha", "divergence=kl"), ("divergence=kl", "divergence=alpha")):
        trained.config["divergence"] = OmegaConf.to_container(composed(own).divergence)
        merged = as_trained(composed("stage=evaluate", other), trained, [])
        assert merged.divergence == trained.config["divergence"]
