"""The policies of evaluated steps, kept so that their curve can be measured again by another judge."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback

from rlhf.distributed import collectives
from rlhf.errors import ConfigError
from rlhf.files import KEPT
from rlhf.policy_settings import METHODS
from rlhf.settings import Settings
from rlhf.stages.evaluation import PolicyEvaluation


class KeptPolicies(Callback):
    """Saves the policy as `kept/step-000020/` of a run's folder before it is evaluated; not step 0, the SFT model.

    Before, because a complete evaluation is not repeated after a kill, and what it measured must be there. `save`
    writes the policy of a stage into a folder.
    """

    def __init__(self, folder: Path, save: Callable[[PolicyEvaluation, Path], None]):
        self.folder, self.save = folder / KEPT, save

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Save the present policy; that of an interrupted process is replaced, as its step is trained again."""
        assert isinstance(module, PolicyEvaluation)
        if module.steps_done and module.settings.evaluates(module.steps_done):  # Lightning asks at regular intervals
            collectives.on_rank_zero(lambda: self._keep(module))

    def _keep(self, stage: PolicyEvaluation) -> None:
        target = self.folder / f"step-{stage.steps_done:06d}"
        aside = self.folder / f".{target.name}"
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed here
        self.save(stage, aside)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)


def check_keeping(settings: Settings, stage: str) -> None:
    """Check `keep_evaluated` of the method by which a stage trains.

    Raises:
        ConfigError: it would keep whole models in another dtype than they are trained in.
    """
    method = stage if stage in METHODS else "ppo"
    if settings.method(stage).keep_evaluated and settings.lora.r == 0 and settings.model.dtype != "float32":
        raise ConfigError(
            f"{method}.keep_evaluated=true with lora=none would round the weights in the middle of the training, to "
            f"model.dtype={settings.model.dtype}; allowed: false, model.dtype=float32, or an adapter such as lora=r8"
        )


def kept_policies(run: Path) -> dict[int, Path]:
    """Step → folder of the policies that a run has kept."""
    return {int(path.name.removeprefix("step-")): path for path in sorted((run / KEPT).glob("step-*"))}
