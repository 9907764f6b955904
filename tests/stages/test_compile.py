"""Compiled blocks give the same updates for all roles and sequence lengths."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from rlhf.rollout.sample import rollout
from rlhf.stages.ppo import PPO
from tests.helpers.command_line import error_sentence
from tests.helpers.ppo_stages import PROMPTS, make_ppo, ppo_settings, train
from tests.helpers.training import record_gradients


def updates(stage: PPO, folder: Path) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    folder.mkdir()
    with record_gradients() as seen:
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
    # Graphs for scoring, updates of the policy and of the value function (two each: the input of the first block has
    # no gradient) and decoding. One more for each length, block or role would be far more than 9.
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
def test_compiled_blocks_make_the_same_updates(
    folders: SimpleNamespace, tmp_path: Path, options: dict, backend: str, checkpointing: bool
) -> None:
    """Runs in a separate process without shape checks, which the compiler cannot trace."""
    torch.multiprocessing.spawn(_compare, (options, backend, checkpointing, folders, tmp_path))


def _decode(_: int, folders: SimpleNamespace, folder: Path) -> None:
    settings = ppo_settings()
    stage = make_ppo(settings, folders, folder)
    roles, sampled = stage.roles, []
    torch.manual_seed(0)  # the fixture's weights depend on earlier tests, and with some of them hardly a row ends early
    for name, parameter in roles.trunk("reference").named_parameters():
        if parameter.dim() > 1 and ".lora_" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    roles.compile_blocks("eager")
    for compiled in (roles.compiled, None) * 2:
        roles.compiled = compiled
        seeded = torch.Generator().manual_seed(len(sampled) // 2)
        sampled.append(rollout(stage.engine, roles, "policy", stage.tokenizer, PROMPTS, settings.generation, seeded))
        if len(sampled) == 2:  # another adapter, merged into other weights
            for parameter in roles.adapter_parameters("base", "policy").values():
                parameter.data.add_(0.05)
    assert sampled[0].responses != sampled[2].responses
    for ours, plain in (sampled[:2], sampled[2:]):
        assert len(set(ours.mask.sum(1).tolist())) > 3  # rows were dropped during decoding
        assert ours.responses == plain.responses
        torch.testing.assert_close(ours.logprobs, plain.logprobs, rtol=1e-4, atol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]


@pytest.mark.long
def test_compiled_decoding_gives_the_same_tokens(folders: SimpleNamespace, tmp_path: Path) -> None:
    """Decoding is one compiled program for all batch sizes and positions, whatever is merged into the weights."""
    torch.multiprocessing.spawn(_decode, (folders, tmp_path))


def test_settings_that_cannot_be_compiled_are_refused(command: Callable) -> None:
    code, _, said = command("debug=quick", "model.compile=true", "trainer=fsdp", "trainer.devices=2")
    assert code == 2
    assert "model.compile=true" in error_sentence(said)
