"""After a trainer the models are where they were, without the optimiser's state; only what is trained is broadcast."""

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from rlhf.data.records import Prompt
from rlhf.distributed import processes, strategies
from rlhf.stages.batches import SeededBatches, loader
from tests.helpers.command_line import TINY
from tests.helpers.ppo_stages import PROMPTS, make_ppo, ppo_settings
from tests.helpers.process_groups import run_in_two_processes
from tests.helpers.training import quiet_trainer


class Line(lightning.LightningModule):
    """A frozen and a trained layer. `left` says whether Lightning has moved them to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization, self.left = False, False
        self.frozen, self.trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1)

    def cpu(self) -> "Line":
        self.left = True
        return super().cpu()

    def training_step(self, batch: Tensor, index: int) -> None:
        self.manual_backward(self.trained(self.frozen(batch)).sum())
        self.optimizers().step()  # type: ignore[union-attr]

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.frozen(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trained.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]


def _train(folder: Path, strategy: Any, **options: Any) -> tuple[bool, bool]:
    """Validate, train and validate: whether the module was moved away, and whether optimiser state has survived."""
    states: list[weakref.ref] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        states.extend(weakref.ref(value) for state in optimizer.state.values() for value in state.values())

    handle = register_optimizer_step_post_hook(look)
    line, batches = Line(), DataLoader(list(torch.ones(2, 3, 2)), batch_size=None)  # type: ignore[arg-type]
    trainer = quiet_trainer(folder, strategy=strategy, max_epochs=1, **options)
    trainer.validate(line, batches, verbose=False)
    moved = line.left
    trainer.fit(line, batches)
    handle.remove()
    gc.collect()
    assert len(states) > 2
    survived = any(state() is not None for state in states)
    trainer.validate(line, batches, verbose=False)
    assert moved == line.left
    assert trainer.lightning_module is line
    assert survived or all(p.grad is None for p in line.parameters())
    return moved, survived


def test_models_stay_on_a_single_device_and_the_optimiser_does_not(tmp_path: Path) -> None:
    assert _train(tmp_path, SingleDeviceStrategy("cpu"), devices=1) == (True, True)  # Lightning's own way
    assert _train(tmp_path, strategies.SingleDevice(), devices=1) == (False, False)


def _train_in_two(rank: int, folder: Path) -> None:
    (folder / str(rank)).mkdir()
    two = {"devices": 2, "plugins": [processes.cluster_environment()]}
    assert _train(folder / str(rank), DDPStrategy(), **two) == (True, True)
    for strategy in (strategies.DataParallel(), strategies.Sharded()):
        assert _train(folder / str(rank), strategy, **two) == (False, False)


def test_models_stay_in_each_of_two_processes(tmp_path: Path) -> None:
    run_in_two_processes(_train_in_two, tmp_path)


def test_models_stay_after_a_failure(tmp_path: Path) -> None:
    class Failing(Line):
        def validation_step(self, batch: Tensor, index: int) -> None:
            raise ValueError("no")

    line = Failing()
    trainer = quiet_trainer(tmp_path, devices=1, strategy=strategies.SingleDevice())
    with suppress(ValueError):
        trainer.validate(line, DataLoader([torch.ones(2)]), verbose=False)  # type: ignore[arg-type]
    assert not line.left


def test_the_trainer_chooses_the_single_device(tmp_path: Path) -> None:
    strategy = strategies.SingleDevice()
    strategy._root_device = torch.device("meta")
    trainer = quiet_trainer(tmp_path, devices=1, strategy=strategy)
    assert trainer.strategy.root_device == torch.device("cpu")
    assert trainer.world_size == trainer.num_devices == 1


def test_no_stage_of_a_run_moves_its_models(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(lightning.LightningModule, "cpu", lambda self: moved.append(type(self).__name__) or self)
    code, _, error = command(*TINY, "trainer=cpu")
    assert code == 0, error
    assert not moved


# -- broadcasts ------------------------------------------------------------------------------------------------------


class Broadcasts(TorchDispatchMode):
    """Collects the sizes of all broadcasts of weights, in elements; objects travel as bytes and do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("c10d.broadcast_"):
            self.sizes += [tensor.numel() for tensor in args[0] if tensor.is_floating_point()]
        return function(*args, **(kwargs or {}))


class Unwrapped(DDPStrategy):
    """Lightning's broadcasts, without the wrapper, which needs a gradient for every trained weight."""

    def configure_ddp(self) -> None: ...


def _sent(rank: int, folders: SimpleNamespace, folder: Path) -> None:
    (folder / str(rank)).mkdir()
    stage = make_ppo(ppo_settings(steps=1), folders, folder / f"{rank}/samples")
    trained = [p for p in stage.parameters() if p.requires_grad]
    base = sum(p.numel() for p in stage.parameters()) - sum(map(torch.numel, trained))
    two = {"devices": 2, "plugins": [processes.cluster_environment()], "use_distributed_sampler": False}
    evaluation = DataLoader([Prompt("w5 w9"), Prompt("w7")], collate_fn=list)  # type: ignore[arg-type]
    with Broadcasts() as seen:
        quiet_trainer(folder / str(rank), strategy=Unwrapped(), **two).validate(stage, evaluation, verbose=False)
    assert sum(seen.sizes) > base
    trainer = quiet_trainer(folder / str(rank), strategy=strategies.DataParallel(), max_epochs=1, **two)
    before = trained[0].detach().clone()
    with torch.no_grad():
        trained[0].add_(rank)  # a process that begins elsewhere is brought back to rank 0's weights
    with Broadcasts() as seen:
        trainer.validate(stage, evaluation, verbose=False)
    assert torch.equal(trained[0], before)
    assert sorted(seen.sizes) == sorted(map(torch.numel, trained))
    assert base > sum(seen.sizes)
    batches = SeededBatches(len(PROMPTS), stage.ppo.rollout_batch_size, 3, 1, 0)
    with Broadcasts() as again:
        trainer.fit(stage, loader(PROMPTS, list, batches))
        trainer.validate(stage, evaluation, verbose=False)
    assert not again.sizes


def test_the_trained_weights_are_broadcast_once_and_the_base_never(folders: SimpleNamespace, tmp_path: Path) -> None:
    run_in_two_processes(_sent, folders, tmp_path)
