"""Every YAML composes, and every mistake ends in one sentence before a model is loaded."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import rlhf.resolvers  # noqa: F401
from rlhf import root
from rlhf.cli import main
from rlhf.config import instantiate, settings_of, target_class
from rlhf.resolvers import folder_name

CONF = root() / "conf"
OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}" for path in sorted(CONF.rglob("*.yaml")) if path.parent != CONF
]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable:
    """Run `rlhf` in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", *arguments])
        code = 0
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("override", OPTIONS)
def test_every_option_composes_and_what_it_names_exists(override: str) -> None:
    # the templates belong to one data set; the function of a function scorer has no default, on purpose
    group = override.partition("=")[0]
    beside = {"data/template": ["data=alpaca"], "scorer=function": ["scorer.function=math.fsum"]}
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("config", [override, *beside.get(group, []), *beside.get(override, [])])
    settings_of(config)
    for key in ("scorer", "judge", "data", "kl", "trainer", "logger"):
        assert callable(target_class(config[key], key))
    instantiate(config.kl, "kl")


BAD = [
    ("divergence=foo", "divergence=foo", "clamped_kl"),
    ("divergance=kl", "divergance", "did you mean divergence"),
    ("ppo.stepz=3", "ppo.stepz", "did you mean steps"),
    ("ppo.steps=abc", "ppo.steps", "abc"),
    ("ppo.lr=-1", "ppo.lr=-1", "above 0"),
    ("ppo.gamma=1.5", "ppo.gamma=1.5", "from 0 to 1"),
    ("ppo.minibatch_size=7", "ppo.minibatch_size=7", "divisor"),
    ("ppo.warmup_steps=60", "ppo.warmup_steps=60", "below ppo.steps=60"),
    ("ppo.value=foo", "ppo.value=foo", "trunk_head"),
    ("lora=none quantization=int8", "lora=none", "quantization"),
    ("quantization=nf4 lora@reward.lora=none stage=reward", "lora@reward.lora=none", "quantization"),
    ("lora.target_modules=[nope]", "nope", "q_proj"),
    ("lora.dropout=2", "lora.dropout=2", "from 0 to 1"),
    ("scorer=function", "scorer.function", "no value"),
    ("scorer=function scorer.function=nope.fn", "scorer.function=nope.fn", "package.module.name"),
    ("scorer._target_=nope.Nope", "scorer._target_=nope.Nope", "cannot be imported"),
    ("divergence.function=rlhf.divergence.nope", "divergence.function=rlhf.divergence.nope", "cannot be imported"),
    ("kl.coef=-1", "kl.coef=-1", "0 or above"),
    ("kl=adaptive kl.target=0", "kl.target=0", "above 0"),
    ("model.dtype=float16", "model.dtype=float16", "bfloat16"),
    ("model.name_or_path=/nope/x", "model.name_or_path=/nope/x", "no such folder"),
    ("data=alpaca", "judge=gold", "data=farm"),
    ("data=alpaca judge=reward_model data.root=/nope", "data.sft", "does not exist"),
    ("data=alpaca judge=reward_model data.preference=null", "preference", "reward model"),
    ("data.people=many", "data", "many"),
    ("generation.engine=foo", "generation.engine=foo", "native"),
    ("generation.temperature=0", "generation.temperature=0", "above 0"),
    ("resume=perhaps", "resume=perhaps", "must"),
    ("trainer=gpu", "trainer.accelerator=gpu", "trainer=cpu"),
    ("ppo.steps", "ppo.steps", ""),
    ("nonsense/group=1", "nonsense/group", "allowed"),
    ("experiments=nope", "experiments=nope", "no such option"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "names", "allowed"), BAD, ids=[row[0] for row in BAD])
def test_a_mistake_is_one_sentence_and_exit_code_2(command: Callable, arguments: str, names: str, allowed: str) -> None:
    if arguments == "trainer=gpu":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    code, _, err = command(*arguments.split())
    assert code == 2, err
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if line.startswith("rlhf: ")]
    assert len(said) == 1, err
    assert names in said[0]
    assert allowed in said[0]
    assert not list(Path("outputs").rglob("*.safetensors")), "a model was made before the mistake was found"


def test_dry_run_says_what_would_be_built_and_builds_nothing(command: Callable) -> None:
    code, out, err = command("dry_run=true")
    assert code == 0, err
    plan = OmegaConf.create(out)
    assert list(plan.cached.values()) == [False, False]
    assert plan.done is False
    assert not Path("outputs/cache").exists()


def test_folders_are_readable_and_safe() -> None:
    assert folder_name("") == "default"
    assert folder_name("divergence-kl_lora-r8") == "divergence-kl_lora-r8"
    assert folder_name("a-x,y=z/../w") == "a-x-y-z-..-w"
    long = folder_name("a-" + "b" * 300)
    assert len(long) < 200
    assert long != folder_name("a-" + "b" * 301)


@pytest.mark.slow
def test_shell_completion_offers_groups_and_options() -> None:
    query = "import os, sys; from rlhf.cli import main; sys.argv = ['rlhf', '-sc', 'query=bash']; main()"
    for line, offered in (("rlhf diver", "divergence="), ("rlhf divergence=clam", "divergence=clamped_kl")):
        done = subprocess.run(
            [sys.executable, "-c", query],
            env={"COMP_LINE": line, "COMP_POINT": str(len(line)), "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert offered in done.stdout
