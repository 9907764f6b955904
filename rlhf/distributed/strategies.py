"""Lightning strategies under which a stage itself adds the gradients up."""

import lightning
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor


class DataParallel(DDPStrategy):
    """Lightning's DDP without its wrapper: `rlhf.stages.base.Stage.accumulate` adds the gradients up, once a step.

    The wrapper would add them up in every backward pass, of which a step has several.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class Sharded(DataParallel):
    """The same around a frozen base of which each process holds its share (`rlhf.models.sharding`)."""

    def setup(self, trainer: lightning.Trainer) -> None:
        """Lightning sends the first process's weights to the others, which must keep their own shares."""
        assert self.model is not None
        shares = [name for name, parameter in self.model.named_parameters() if isinstance(parameter, DTensor)]
        self.model._ddp_params_and_buffers_to_ignore = shares  # type: ignore[assignment]
        super().setup(trainer)

    def teardown(self) -> None:
        """Leave the module on its device, as Lightning's own strategies for shards do: there are passes to come."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
