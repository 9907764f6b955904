"""Compiled blocks: the same updates, whatever role runs and however long the texts are."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import gradients, make_ppo, ppo_settings, train
from tiny_runs import sentence
from torch._dynamo.utils import counters

from rlhf.stages.ppo import PPO


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def updates(stage: PPO, folder: Path) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    with gradients() as seen:
        lines = train(stage, folder)
    return lines, [gradient for step in seen for gradient in step if gradient is not None]


@pytest.mark.parametrize(
    ("options", "backend", "checkpointing"),
    [
        ({}, "aot_eager", False),
        ({"divergence": "exact_kl", "kind": "logits"}, "aot_eager", True),
        pytest.param({}, "inductor", False, marks=pytest.mark.long),
    ],
)
def test_the_same_updates(
    folders: SimpleNamespace, tmp_path: Path, options: dict, backend: str, checkpointing: bool
) -> None:
    plain, compiled = (make_ppo(ppo_settings(**options), folders, tmp_path / "samples") for _ in range(2))
    for stage in (plain, compiled) if checkpointing else ():
        stage.roles.checkpoint_activations()
    compiled.roles.compile_blocks(backend)
    (tmp_path / "plain").mkdir()
    (tmp_path / "compiled").mkdir()
    expected, theirs = updates(plain, tmp_path / "plain")
    assert not counters["stats"]
    lines, ours = updates(compiled, tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] >= 3  # scoring, the policy's update, the value function's
    assert counters["stats"]["unique_graphs"] <= 8  # none for each text's length, nor for each block
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    for key in ("ppo/reward", "ppo/policy_loss", "ppo/value_loss", "ppo/response_tokens"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], abs=1e-4)


def test_what_cannot_be_compiled(command: Callable) -> None:
    code, _, said = command("debug=quick", "model.compile=true", "trainer=fsdp", "trainer.devices=2")
    assert code == 2
    assert "model.compile=true" in sentence(said)
