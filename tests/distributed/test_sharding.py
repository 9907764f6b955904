"""A frozen base sharded over two real processes: the same updates as with a whole base, with half of it in each."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from rlhf.distributed import collectives, lockstep, processes, strategies
from rlhf.models.roles import Roles
from rlhf.models.sharding import full_weights, shard
from rlhf.rollout.sample import Rollouts, rollout
from rlhf.settings import Settings
from rlhf.stages.passes import compute_values
from rlhf.stages.ppo import PPO
from tests.helpers.calls import record_calls
from tests.helpers.command_line import error_sentence
from tests.helpers.ppo_stages import PROMPTS, make_ppo, ppo_settings, train
from tests.helpers.process_groups import run_in_two_processes
from tests.helpers.rollouts import EchoEngine
from tests.helpers.run_results import assert_identical, collect_run_results
from tests.helpers.subprocess_runs import cached_weights, run_tiny, stop_after_a_step
from tests.helpers.training import copy_weights, record_gradients

CPU = ["trainer.devices=2", "trainer.accelerator=cpu"]
RUN = [
    *CPU, "lora@sft.lora=r8", "model.config.num_hidden_layers=2", "ppo.steps=6", "ppo.checkpoint_every=1",
    "sft.batch_size=9", "sft.microbatch_tokens=60", "reward.batch_size=9", "reward.microbatch_tokens=120",  # uneven
]  # fmt: skip


def _sharded(settings: Settings, folders: SimpleNamespace, folder: Path) -> PPO:
    stage = make_ppo(settings, folders, folder / "samples")
    shard(stage.roles, "cpu")
    return stage


# -- sharded modules --------------------------------------------------------------------------------------------------


def _halves(rank: int, folders: SimpleNamespace, folder: Path) -> None:
    whole, stage = make_ppo(ppo_settings(), folders, folder / "samples"), _sharded(ppo_settings(), folders, folder)
    _held(rank, whole.roles, stage.roles)
    _sampled(rank, whole, stage)


def _held(rank: int, whole: Roles, roles: Roles) -> None:
    """Each process holds half of every block; the halves together are the original base."""
    spread = [p for p in roles.trunk("reference").parameters() if isinstance(p, DTensor)]
    here, everywhere = sum(p.to_local().numel() for p in spread), sum(map(torch.numel, spread))
    blocks = whole.trunk("reference").base_model.layers
    assert everywhere == sum(p.numel() for name, p in blocks.named_parameters() if ".lora_" not in name)
    assert here == everywhere // 2
    again = full_weights(roles)
    assert bool(again) == (rank == 0)
    for name, value in whole.trunk("reference").state_dict().items() if again else ():
        if ".lora_" not in name:
            assert torch.equal(again[name.replace(".base_layer.", ".")], value)


def _sampled(rank: int, whole: PPO, stage: PPO) -> None:
    """Processes with different prompts and numbers of batches do not deadlock; results are those of a whole base."""
    prompts, limit = (PROMPTS[:3], 5) if rank else (PROMPTS[3:20], 16)

    def answers(of: PPO) -> Rollouts:
        generation = of.config.generation
        return rollout(of.engine, of.roles, "policy", of.tokenizer, prompts, generation, of.stream("x", 0), None, limit)

    expected, sampled = answers(whole), answers(stage)
    assert sampled.responses == expected.responses
    lengths = collectives.all_gather(sampled.mask.sum(1).max().item())
    assert lengths[0] > lengths[1]
    # forward passes on rank 0 alone, such as those of a judge that uses the reward model
    score = collectives.on_rank_zero(lambda: compute_values(stage.roles, sampled.sequences, 60))
    if rank == 0:
        torch.testing.assert_close(score, compute_values(whole.roles, sampled.sequences, 60))


@pytest.mark.long
def test_each_holds_half_and_samples_for_as_long_as_it_takes(folders: SimpleNamespace, tmp_path: Path) -> None:
    run_in_two_processes(_halves, folders, tmp_path)


# -- updates ---------------------------------------------------------------------------------------------------------


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"rollout_batch_size": 10, "minibatch_size": 5, "microbatch_tokens": 12}, {"dtype": "bfloat16"}),
    ({"divergence": "exact_kl", "kind": "logits"}, {"gradient_checkpointing": True}),
]


def _updates(stage: PPO, folder: Path, strategy: Any) -> tuple[Any, Any, Any]:
    stage.engine = EchoEngine()  # type: ignore[assignment]
    folder.mkdir()
    with record_gradients() as seen:
        metrics = train(
            stage,
            folder,
            devices=2,
            strategy=strategy,
            plugins=[processes.cluster_environment()],
            use_distributed_sampler=False,
        )
    return seen, metrics, {key: value for key, value in copy_weights(stage.roles).items() if ".lora_" in key}


def _same_updates(rank: int, folders: SimpleNamespace, folder: Path) -> None:
    """Two processes with the whole base each and two with half of it each, also with uneven shares of a batch."""
    with pytest.MonkeyPatch.context() as patch:
        filled = record_calls(patch, lockstep, "filler_parts")
        _updates_in_turn(rank, folders, folder)
        assert (
            sum(collectives.all_gather(sum(len(parts) for _, parts in filled))) > 0
        )  # one process had fewer micro-batches than the other


def _updates_in_turn(rank: int, folders: SimpleNamespace, folder: Path) -> None:
    for number, (ppo, model) in enumerate(VARIANTS):
        settings = ppo_settings(**{"epochs": 2, "lr": 1e-4, **ppo})
        settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **model))
        own = folder / f"{number}-{rank}"
        whole = make_ppo(settings, folders, own / "samples")
        expected = _updates(whole, own.with_suffix(".whole"), strategies.DataParallel())
        halves = _updates(_sharded(settings, folders, own), own.with_suffix(".halves"), strategies.Sharded())
        lockstep.disable()
        assert len(halves[0]) == len(expected[0]) == 8
        # a whole float32 base scores with merged adapters, which round differently
        close = {"rtol": 0.0, "atol": 0.0} if model.get("dtype") == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
        for step in zip(expected[0], halves[0], strict=True):
            for one, half in zip(*step, strict=True):
                torch.testing.assert_close(half, one, **close)
        for key, value in expected[2].items():
            torch.testing.assert_close(halves[2][key], value, rtol=0, atol=1e-5)
        for one, half in zip(expected[1], halves[1], strict=True):
            kept = [key for key in one if not key.startswith(("time", "ppo/rollouts_per_second"))]
            assert {key: half[key] for key in kept} == pytest.approx(
                {key: one[key] for key in kept}, rel=1e-3, abs=1e-4
            )
        everywhere = collectives.all_gather({key: value.tolist() for key, value in halves[2].items()})
        assert everywhere[0] == everywhere[1]


@pytest.mark.long
def test_the_updates_are_those_of_data_parallel(folders: SimpleNamespace, tmp_path: Path) -> None:
    run_in_two_processes(_same_updates, folders, tmp_path)


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of complete runs by two processes, once with the whole base in each and once with half of it."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("ddp", "fsdp")}
    for name, folder in folders.items():
        done = run_tiny(folder, f"trainer={name}", *RUN)
        assert done.returncode == 0, done.stdout + done.stderr
    return folders


def _result(folder: Path) -> Path:
    return next(folder.glob("outputs/rlhf/*/summary.json")).parent


@pytest.mark.long
def test_all_stages_are_those_of_data_parallel(runs: dict[str, Path]) -> None:
    """Both give the same SFT model, reward model and policy to 1e-5, and plain transformers and peft load them."""
    for stage in ("sft", "reward"):
        whole, shared = (cached_weights(folder, stage) for folder in runs.values())
        assert whole.keys() == shared.keys()
        for key, value in whole.items():
            torch.testing.assert_close(shared[key], value, rtol=0, atol=1e-5)
    whole, shared = (load_file(_result(folder) / "model/adapter_model.safetensors") for folder in runs.values())
    assert whole.keys() == shared.keys()
    for key, value in whole.items():
        torch.testing.assert_close(shared[key], value, rtol=0, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(next(runs["fsdp"].glob("outputs/cache/sft-*/model")))
    policy = AutoPeftModelForCausalLM.from_pretrained(_result(runs["fsdp"]) / "model")
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.equal(policy(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.long
def test_two_halves_stop_and_continue_to_the_same_bits(runs: dict[str, Path], tmp_path: Path) -> None:
    options = ["trainer=fsdp", *RUN]
    assert stop_after_a_step(tmp_path, True, options) == 75
    done = run_tiny(tmp_path, *options, "resume=must")
    assert done.returncode == 0, done.stdout + done.stderr
    a, b = (list(collect_run_results([_result(folder)]).values()) for folder in (runs["fsdp"], tmp_path))
    assert len(a) > 4
    assert_identical(a, b)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora=none"], "lora=none trains the base itself"),
        (["lora@reward.lora=none"], "lora@reward.lora=none"),
        (["lora@sft.lora=none", "stage=sft"], "lora@sft.lora=none"),
        (["quantization=int8"], "quantized base; allowed: quantization=none"),
        (["ppo.value_model=full"], "allowed: adapter"),
    ],
)
def test_settings_that_shards_cannot_serve_are_refused(command: Callable, arguments: list[str], words: str) -> None:
    code, _, said = command("debug=quick", "data=farm", "trainer=fsdp", *CPU, "lora@sft.lora=r8", *arguments)
    assert code == 2
    assert words in error_sentence(said)


def test_a_torch_that_cannot_shard_the_base_alone_is_refused(
    command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with torch 2.6, whose `fully_shard` cannot leave out the adapters."""
    monkeypatch.setattr("rlhf.pipeline.capabilities.fully_shard", lambda module, *, mesh=None: module)
    code, _, said = command("debug=quick", "trainer=fsdp", *CPU)
    assert code == 2
    assert "needs torch 2.7 or later" in error_sentence(said)
