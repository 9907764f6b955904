"""`lora` in the configuration: what is refused and why, options that compose, identities, a run with every option."""

import re
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from tests.helpers.command_line import TINY, run_in_process
from tests.helpers.composed_config import compose_and_check, composed_plan, composed_settings

REFUSED = [
    ("lora.init=pissa", "lora.init=pissa moves a part of the base's weights into the adapter, and the base is shared"),
    ("lora.init=pissa_niter_4", "moves a part of the base's weights"),
    ("lora.init=OLoRA", "moves a part of the base's weights"),
    ("lora.init=loftq", "moves a part of the base's weights"),
    ("lora.init=eva", "lora.init=eva is not allowed; allowed: default or gaussian"),
    ("data=farm reward.lora.init=corda", "reward.lora.init=corda moves a part"),
    ("lora@sft.lora=r8 sft.lora.init=pissa", "sft.lora.init=pissa moves a part"),
    ("lora.modules_to_save=[embed_tokens]", "allowed: null, or lora=none, which trains everything"),
    ("lora.target_modules=all", "=all is not allowed; allowed: a list of names of linear layers, or all-linear"),
    ("lora.target_modules=[nope]", "named nope that an adapter fits; allowed: all-linear, or some of down_proj"),
    (
        "lora.layers_to_transform=[4]",
        "lora.layers_to_transform=[4]: the model has blocks 0 to 3; allowed: some of them",
    ),
    ("lora.layers_to_transform=[-1]", "the model has blocks 0 to 3"),
    ("lora.layers_to_transform=[]", "the model has blocks 0 to 3"),
    ("lora.lr_ratio=0", "lora.lr_ratio=0.0 is not allowed; allowed: a number above 0"),
    ("lora.dora=true quantization=int8", "lora.dora=true: DoRA cannot be merged into rounded weights; allowed: quant"),
    ("lora.dora=true model.compile=true", "untested with model.compile=true; allowed: model.compile=false"),
    (
        "data=farm reward.lora.dora=true trainer=fsdp trainer.devices=2",
        "untested with trainer=fsdp; allowed: trainer=ddp",
    ),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_mistake_is_refused_before_any_model(arguments: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        compose_and_check(*arguments.split())


@pytest.mark.parametrize("lora", ["r1", "r1_all", "r8", "r8_all", "r16", "r16_all", "r64", "r64_all"])
def test_an_option_has_the_rank_of_its_name_and_one_scale(lora: str) -> None:
    settings = composed_settings(f"lora={lora}", f"lora@reward.lora={lora}", f"lora@sft.lora={lora}")
    rank, _, layers = lora.removeprefix("r").partition("_")
    assert settings.lora == settings.reward.lora == settings.sft.lora
    assert (settings.lora.r, settings.lora.scale) == (int(rank), 8)
    expected = "all-linear" if layers else ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert settings.lora.target_modules == expected


def test_every_option_decides_the_run(tmp_path: Path) -> None:
    chosen = ["rslora=true", "dora=true", "lr_ratio=16", "init=gaussian"]
    plans = [composed_plan(tmp_path, "data=farm", *key) for key in ([], *([f"lora.{key}"] for key in chosen))]
    assert len({plan.identity for plan in plans}) == len(plans)
    assert len({(plan.sft_folder, plan.reward_folder) for plan in plans}) == 1
    other = composed_plan(tmp_path, "data=farm", "reward.lora.dora=true")
    assert (other.reward_folder != plans[0].reward_folder, other.sft_folder) == (True, plans[0].sft_folder)


@pytest.mark.slow
def test_a_whole_run_with_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["target_modules=all-linear", "dora=true", "rslora=true", "lr_ratio=4", "init=gaussian"]
    loras = [f"{place}lora.{key}" for place in ("", "reward.", "sft.") for key in keys]
    assert run_in_process(*TINY, "lora@sft.lora=r8", *loras, "lora.layers_to_transform=[0]", "reference=ema") == 0
    assert list(tmp_path.glob("outputs/rlhf/*/model/adapter_model.safetensors"))
