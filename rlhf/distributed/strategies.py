"""Lightning strategies that leave modules on their device, for stages that reduce their own gradients."""

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.strategy import Strategy

from rlhf.distributed import collectives


class Staying(Strategy):
    """A strategy after whose `fit` and `validate` the module is where it was, without what only `fit` needed.

    Lightning would move it to the CPU each time. But one trainer of a stage follows another, and the models answer and
    score between them: they would do so on the CPU, and the weights of a quantized base would part from their scales.
    """

    def teardown(self) -> None:
        """Hide the module from Lightning's teardown, and free gradients and the state of the optimisers."""
        module, self._lightning_module = self._lightning_module, None
        self.optimizers, self.lr_scheduler_configs = [], []
        if module is not None:
            module.zero_grad(set_to_none=True)
        try:
            super().teardown()  # its end empties the allocator's cache
        finally:
            self._lightning_module = module


class SingleDevice(Staying, SingleDeviceStrategy):
    """Lightning's strategy for one process, on the device that the trainer chooses."""

    @property
    def parallel_devices(self) -> list[torch.device]:
        """No wish of its own: Lightning then sets the devices that `accelerator` and `devices` ask for."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        self._root_device = devices[0]


class DataParallel(Staying, DDPStrategy):
    """Lightning's DDP without the `DistributedDataParallel` wrapper, and without its broadcasts of the whole module.

    The wrapper would all-reduce gradients in every backward pass. An optimiser step here has several backward passes,
    one per microbatch, and `rlhf.stages.base.Stage.accumulate` all-reduces once at its end.

    Every process loads the frozen weights and computes the buffers itself, from the same files. What is trained is
    broadcast once, before the first use: later it stays equal, because all processes make the same steps or load the
    same checkpoint.
    """

    _agreed = False

    def configure_ddp(self) -> None:
        """Leave the module unwrapped."""

    def setup(self, trainer: lightning.Trainer) -> None:
        """Exclude all weights from Lightning's broadcast, and make one of those that are trained."""
        assert self.model is not None
        names = [name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())]
        self.model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]
        super().setup(trainer)
        if not self._agreed:
            collectives.broadcast_([p for p in self.model.parameters() if p.requires_grad])
            self._agreed = True


class Sharded(DataParallel):
    """`DataParallel` for a frozen base whose weights are sharded over the processes (`rlhf.models.sharding`)."""
