"""Two real processes on one run: collectives, joint updates, and stopping and resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf import ppo
from rlhf.distributed import collectives, processes, strategies
from rlhf.errors import Interrupted
from rlhf.models.roles import MOVING_REFERENCE
from rlhf.stages.minibatches import split_minibatches
from rlhf.stages.reference import EMA, Sync
from tests.helpers.command_line import error_sentence
from tests.helpers.ppo_stages import PROMPTS, make_ppo, ppo_settings, train, with_advantages
from tests.helpers.process_groups import run_in_two_processes
from tests.helpers.rollouts import EchoEngine
from tests.helpers.run_results import assert_identical, collect_run_results
from tests.helpers.subprocess_runs import cached_weights, run_tiny, stop_after_a_step
from tests.helpers.training import copy_weights, record_gradients

DEVICES = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


# -- collectives -----------------------------------------------------------------------------------------------------


def _pieces(rank: int) -> None:
    assert (collectives.rank(), collectives.size(), collectives.is_rank_zero()) == (rank, 2, rank == 0)
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    assert collectives.all_reduce_sum(x).tolist() == [3, 6]
    assert x.tolist() == [rank + 1, 2 * (rank + 1)]  # the result is a new tensor
    mixed = [torch.full((2, 3), 1.0 + rank), torch.tensor(5 + rank), torch.ones(4) * rank]
    collectives.BUCKET = 7  # too small for all tensors, so that several buckets are needed
    collectives.all_reduce_(mixed)
    assert [t.flatten()[0].item() for t in mixed] == [3.0, 11, 1.0]
    assert collectives.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert collectives.on_rank_zero(lambda: f"said by {rank}") == "said by 0"
    # a nested call runs on rank 0 alone and must not wait for the other process
    assert collectives.on_rank_zero(lambda: collectives.on_rank_zero(collectives.size)) == 1
    with pytest.raises(Interrupted, match="by 0"):
        collectives.on_rank_zero(lambda: _fail(rank))
    _means(rank)


def _fail(rank: int) -> None:
    raise Interrupted(f"raised by {rank}")


def _means(rank: int) -> None:
    """With uneven shares, every mean and standard deviation is that of the whole batch."""
    numbers = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 4, generator=numbers), torch.randn(5, 4, generator=numbers)
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3])[:, None]
    own, total = slice(rank, None, 2), collectives.all_reduce_sum
    expected = ppo.whiten(x, mask, keep_mean=True)[own]
    torch.testing.assert_close(ppo.whiten(x[own], mask[own], keep_mean=True, all_reduce=total), expected)
    torch.testing.assert_close(
        ppo.explained_variance(x[own], y[own], mask[own], total), ppo.explained_variance(x, y, mask)
    )
    alone, shared = ppo.ScoreNormalizer("standardize", None), ppo.ScoreNormalizer("standardize", None, total)
    for column in x.T:
        torch.testing.assert_close(shared(column[own]), alone(column)[own])


def test_collectives_in_two_processes_agree() -> None:
    run_in_two_processes(_pieces)


def test_collectives_in_a_single_process_are_the_identity() -> None:
    x = torch.ones(3)
    collectives.all_reduce_([x])
    assert collectives.all_reduce_sum(x) is x
    assert (collectives.size(), collectives.all_gather(7), collectives.on_rank_zero(lambda: 8)) == (1, [7], 8)


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [({}, 1), ({"devices": 3}, 3), ({"devices": "2"}, 2), ({"devices": [0, 2, 3]}, 3),
     ({"devices": "auto", "accelerator": "cpu"}, 1), ({"devices": "auto"}, max(1, torch.cuda.device_count()))],
)  # fmt: skip
def test_the_number_of_processes_follows_from_the_trainer(trainer: dict, expected: int) -> None:
    assert processes.local_world_size(OmegaConf.create(trainer)) == expected


# -- updates ---------------------------------------------------------------------------------------------------------


def _updates(options: dict[str, Any], folders: SimpleNamespace, folder: Path, **trainer: Any) -> tuple[Any, Any, Any]:
    chosen = {key: value for key, value in options.items() if key not in ("advantages", "rule")}
    settings = with_advantages(ppo_settings(**chosen), options.get("advantages", "gae"))
    stage = make_ppo(settings, folders, folder / "samples", rule=options.get("rule"))
    stage.engine = EchoEngine()  # type: ignore[assignment]
    with record_gradients() as seen:
        metrics = train(stage, folder, **trainer)
    return seen, metrics, {key: value for key, value in copy_weights(stage.roles).items() if ".lora_" in key}


def _updates_of_two(rank: int, options: dict[str, Any], folders: SimpleNamespace, folder: Path) -> None:
    together = {
        "devices": 2, "strategy": strategies.DataParallel(), "plugins": [processes.cluster_environment()],
        "use_distributed_sampler": False,
    }  # fmt: skip
    own = folder / str(rank)
    own.mkdir()
    torch.save(_updates(options, folders, own, **together), folder / f"{rank}.pt")


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"rollout_batch_size": 10, "minibatch_size": 5},
        {},
        {"divergence": "exact_kl", "kind": "logits"},
        {"advantages": "grpo", "rollout_batch_size": 24, "minibatch_size": 12},
        {"rule": EMA(0.5)},
        {"rule": Sync(None, 1e-4)},  # at a KL, which is the mean over both
    ],
    ids=["uneven", "even", "exact", "groups", "average", "synchronised"],
)
def test_two_processes_make_the_update_of_one(options: dict, folders: SimpleNamespace, tmp_path: Path) -> None:
    """For the same global batch, gradients agree to 1e-5 at every step, and both processes log the same metrics.

    Both hold the same moving reference.
    """
    options = {"epochs": 2, "lr": 1e-4, **options}
    (tmp_path / "alone").mkdir()
    expected, metrics, alone = _updates(options, folders, tmp_path / "alone")
    run_in_two_processes(_updates_of_two, options, folders, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first[0]) == len(expected) == 8
    for step in zip(expected, first[0], second[0], strict=True):
        for one, a, b in zip(*step, strict=True):
            assert (one is None) == (a is None)
            if one is not None:
                assert torch.equal(a, b)
                torch.testing.assert_close(a, one, rtol=1e-4, atol=1e-5)
    for key, value in alone.items():
        torch.testing.assert_close(first[2][key], value, rtol=0, atol=1e-5)
        assert torch.equal(first[2][key], second[2][key])
    assert any(f".{MOVING_REFERENCE}." in key for key in first[2]) == ("rule" in options)
    clock = ("time", "ppo/rollouts_per_second")
    for one, a, b in zip(metrics, first[1], second[1], strict=True):
        kept = [key for key in one if not key.startswith(clock)]
        assert {key: a[key] for key in kept} == {key: b[key] for key in kept}
        assert {key: a[key] for key in kept} == pytest.approx({key: one[key] for key in kept}, rel=1e-3, abs=1e-4)


def _own_rollouts(rank: int, folders: SimpleNamespace, folder: Path) -> None:
    stage = make_ppo(ppo_settings(), folders, folder / "samples")
    prompts, _ = split_minibatches(PROMPTS[:12], stage.ppo.minibatch_size, stage.config.seed, 1)
    stream = torch.rand(3, generator=stage.stream(f"rollout of process {rank}" if rank else "rollout", 1))
    everyone = collectives.all_gather((prompts, stream.tolist()))
    assert sorted(everyone[0][0] + everyone[1][0]) == sorted(PROMPTS[:12])
    assert everyone[0][1] != everyone[1][1]


@pytest.mark.long
def test_each_has_its_own_prompts_and_random_numbers(folders: SimpleNamespace, tmp_path: Path) -> None:
    run_in_two_processes(_own_rollouts, folders, tmp_path)


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_supervised_stages_are_those_of_one_process(tmp_path: Path) -> None:
    """Two processes train the same SFT and reward model as one, to 1e-5 in the weights."""
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    for name, folder in folders.items():
        folder.mkdir()
        done = run_tiny(folder, "stage=reward", *(DEVICES if name == "two" else []))
        assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("sft", "reward"):
        one, two = (cached_weights(folder, stage) for folder in folders.values())
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)
        rows = [
            [json.loads(line) for line in next(folder.glob(f"outputs/cache/{stage}-*/metrics.jsonl")).open()]
            for folder in folders.values()
        ]
        for a, b in zip(*rows, strict=True):
            kept = [key for key in a if not key.startswith("time")]
            assert {key: b[key] for key in kept} == pytest.approx({key: a[key] for key in kept}, rel=1e-3, abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("reference", ["fixed", "ema"])
def test_two_processes_stop_and_continue_to_the_same_bits(reference: str, tmp_path: Path) -> None:
    """A signal to either process stops both after the step; resumed, the run ends with an undisturbed run's bits."""
    options = [*DEVICES, "ppo.steps=6", "ppo.checkpoint_every=1", f"reference={reference}"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    done = run_tiny(whole, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    for to_child in (False, True):
        assert stop_after_a_step(stopped, to_child, options) == 75
    folder = next(stopped.glob("outputs/rlhf/*"))
    refused = run_tiny(stopped, "trainer=cpu", *options[len(DEVICES) :], f"hydra.run.dir={folder}")
    assert refused.returncode == 2
    assert "the checkpoint was made by 2" in error_sentence(refused.stderr)
    done = run_tiny(stopped, *options, "resume=must")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [next(folder.glob("outputs/rlhf/*/summary.json")).parent for folder in (whole, stopped)]
    a, b = (list(collect_run_results([run]).values()) for run in runs)
    assert len(a) > 4
    assert_identical(a, b)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer=cpu", "trainer.devices=2"], "trainer=ddp"),
        ([*DEVICES, "ppo.minibatch_size=1"], "each needs a row"),
        ([*DEVICES, "advantages=rloo", "ppo.minibatch_size=4"], "each needs a row"),
        ([*DEVICES, "trainer.num_nodes=2"], "torchrun"),
        ([*DEVICES, "ppo=as_published", "ppo.rollout_batch_size=64", "ppo.minibatch_size=64"], "as_published"),
    ],
)
def test_settings_that_two_processes_cannot_share_are_refused(
    command: Callable, arguments: list[str], words: str
) -> None:
    code, _, said = command("debug=quick", *arguments)
    assert code == 2
    assert words in said
