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


def updates(stage: PPO, folder: Path) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    folder.mkdir()
    with gradients() as seen:
        lines = train(stage, folder)
    return lines, [gradient for step in seen for gradient in step if gradient is not None]


def _compare(_: int, options: dict, backend: str, checkpointing: bool, folders: SimpleNamespace, folder: Path) -> None:
    plain, compiled = (make_ppo(ppo_settings(**options), folders, folder / "samples") for _ in range(2))
    for stage in (plain, compiled) if checkpointing else ():
        stage.roles.checkpoint_activations()
    compiled.roles.compile_blocks(backend)
    expected, theirs = updates(plain, folder / "plain")
    assert not counters["stats"]
    lines, ours = updates(compiled, folder / "compiled")
    # scoring, the policy's update, the value function's (of each the first block, whose input has no gradient): one
    # more for each text's length, block or role would be many
    assert 3 <= counters["stats"]["unique_graphs"] <= 9
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    for key in ("ppo/reward", "ppo/policy_loss", "ppo/value_loss", "ppo/response_tokens"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "backend", "checkpointing"),
    [
        ({}, "aot_eager", False),
        ({"divergence": "exact_kl", "kind": "logits"}, "aot_eager", True),
        ({}, "inductor", False),
    ],
)
def test_the_same_updates(
    folders: SimpleNamespace, tmp_path: Path, options: dict, backend: str, checkpointing: bool
) -> None:
    """In a process of its own, without the checks of shapes, which the compiler cannot see through."""
    torch.multiprocessing.spawn(_compare, (options, backend, checkpointing, folders, tmp_path))


def test_what_cannot_be_compiled(command: Callable) -> None:
    code, _, said = command("debug=quick", "model.compile=true", "trainer=fsdp", "trainer.devices=2")
    assert code == 2
    assert "model.compile=true" in sentence(said)
