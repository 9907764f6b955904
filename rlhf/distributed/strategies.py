"""Lightning strategies for stages that reduce their own gradients."""

import lightning
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.tensor import DTensor


class DataParallel(DDPStrategy):
    """Lightning's DDP without the `DistributedDataParallel` wrapper.

    The wrapper would all-reduce gradients in every backward pass. An optimiser step here has several backward passes,
    one per microbatch, and `rlhf.stages.base.Stage.accumulate` all-reduces once at its end.
    """

    def configure_ddp(self) -> None:
        """Leave the module unwrapped."""


class Sharded(DataParallel):
    """`DataParallel` for a frozen base whose weights are sharded over the processes (`rlhf.models.sharding`)."""

    def setup(self, trainer: lightning.Trainer) -> None:
        """Exclude the shards from Lightning's broadcast of rank 0's weights: each process keeps its own."""
        assert self.model is not None
        shards = [name for name, parameter in self.model.named_parameters() if isinstance(parameter, DTensor)]
        self.model._ddp_params_and_buffers_to_ignore = shards  # type: ignore[assignment]
        super().setup(trainer)

    def teardown(self) -> None:
        """Leave the module on its device, as Lightning's own FSDP strategies do: later stages still use it."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
