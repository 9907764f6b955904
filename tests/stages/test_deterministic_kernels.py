"""With `trainer.deterministic=true` torch refuses some operations on a GPU: no stage uses any of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from rlhf.data.records import Prompt
from rlhf.rollout.native import sample_tokens
from rlhf.stages.batches import SeededBatches, loader
from rlhf.stages.losses import LARGEST_RATIO, RATIO_BINS
from tests.helpers.ppo_stages import LORA, PROMPTS, make_ppo, ppo_settings
from tests.helpers.supervised_stages import COMPARISONS, DEMONSTRATIONS, reward_stage, sft_stage
from tests.helpers.training import fit, quiet_trainer

# Operations that a GPU has no deterministic kernel for, by the documentation of torch.use_deterministic_algorithms;
# those of images and of sparse tensors are left out.
REFUSED = {"histc", "put_", "put", "kthvalue", "_ctc_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"}


class Refusing(TorchDispatchMode):
    """Raises where torch would in deterministic mode, if the tensors were on a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        kwargs = kwargs or {}
        assert name not in REFUSED, name
        if name in ("cumsum", "cumsum_"):
            assert not kwargs.get("dtype", args[0].dtype).is_floating_point, name
        if name == "median":
            assert len(args) == 1, name  # with a dimension it returns indices too
        if name == "bincount":
            assert len(args) < 2 or args[1] is None, name
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Dashboard(Logger):
    """A logger that takes histograms, as that of W&B does."""

    name, version = "dashboard", "0"

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[torch.Tensor] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...
    def log_metrics(self, *_: Any, **__: Any) -> None: ...
    def log_samples(self, *_: Any) -> None: ...
    def alert(self, *_: Any) -> None: ...

    def log_histograms(self, scores: Any, ratio_counts: Any, largest_ratio: float, step: int) -> None:
        self.counts.append(ratio_counts)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("exact", [False, True])
def test_ppo_and_its_evaluation(folders: SimpleNamespace, tmp_path: Path, dropout: float, exact: bool) -> None:
    chosen = {"divergence": "exact_kl", "kind": "logits"} if exact else {}
    settings = ppo_settings(lora=replace(LORA, dropout=dropout), steps=1, score_normalization="standardize", **chosen)
    stage, dashboard = make_ppo(settings, folders, tmp_path / "samples"), Dashboard()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.loggers = [dashboard]
    batches = SeededBatches(len(PROMPTS), stage.ppo.rollout_batch_size, 3, 1, 0)
    with Refusing():
        trainer.fit(stage, loader(PROMPTS, list, batches))
        trainer.validate(stage, DataLoader([Prompt("w5 w9")], collate_fn=list), verbose=False)
    counts = dashboard.counts[0]
    assert len(counts) == RATIO_BINS
    assert counts.sum() > 0
    assert counts[int(RATIO_BINS / LARGEST_RATIO)] > 0  # ratios of 1


def test_the_supervised_stages(folders: SimpleNamespace, tmp_path: Path) -> None:
    for stage, rows in ((sft_stage(folders), DEMONSTRATIONS), (reward_stage(folders), COMPARISONS)):
        with Refusing():
            fit(stage, stage.encode(rows), SeededBatches(len(rows), len(rows), 0, 1), tmp_path)  # type: ignore[attr-defined]


def test_sampling_is_that_of_the_default(folders: SimpleNamespace) -> None:
    """In integers the cumulative distribution is exact: the tokens are the same but where a draw lies on a border."""
    numbers = torch.Generator().manual_seed(0)
    logits, draws = torch.randn(2000, 300, generator=numbers) * 3, torch.rand(2000, generator=numbers)
    with Refusing():
        exact, _ = sample_tokens(logits, 0.7, draws, capture=False)
    torch.use_deterministic_algorithms(False)
    usual, _ = sample_tokens(logits, 0.7, draws, capture=False)
    assert (exact == usual).float().mean() > 0.999
    ones, _ = sample_tokens(torch.tensor([[0.0, -1e9, -1e9]]), 1.0, torch.tensor([1 - 1e-7]), capture=False)
    assert ones.tolist() == [0]
