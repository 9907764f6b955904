"""Models that cannot be read, whose words are others, or that are still being trained: said before one is loaded."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.data.farm import Farm
from rlhf.data.farm.tokenizer import word_tokenizer as words_of
from rlhf.errors import ConfigError, RunError
from rlhf.files import NOTE, SUMMARY, write_json
from rlhf.finished.chat import cli as chat
from rlhf.finished.compare import cli as compare
from rlhf.finished.export import cli as export
from rlhf.finished.policies import open_policy
from rlhf.finished.vocabulary import check_knows
from rlhf.models.released import find
from tests.helpers.finished_runs import finished_outputs

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return finished_outputs(tmp_path_factory.mktemp("broken") / "outputs")


def cut(folder: Path) -> None:
    """As a copy that was interrupted leaves the file."""
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def part_missing(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "model-00002-of-00002.safetensors"}}))


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, r"model\.safetensors is damaged, perhaps by an interrupted download \(.*\); allowed: a whole model"),
        (part_missing, r"model-00002-of-00002\.safetensors is missing in .*/model; allowed: a whole model, with all"),
        (no_weights, r"there are no weights in .*/model; allowed: a whole model, with all its \*\.safetensors"),
        (no_tokenizer, "no tokenizer can be read there; allowed: a model with its tokenizer"),
    ],
)
def test_a_model_that_is_not_whole(
    runs: SimpleNamespace, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    shutil.copytree(runs.sft / "model", tmp_path / "model")
    assert open_policy(str(tmp_path / "model")).label == "model"
    spoil(tmp_path / "model")
    with pytest.raises(ConfigError, match=said):
        open_policy(str(tmp_path / "model"))


def test_the_base_of_an_adapter_is_checked_with_it(runs: SimpleNamespace, tmp_path: Path) -> None:
    for name, source in (("base", runs.sft), ("adapter", runs.ppo)):
        shutil.copytree(source / "model", tmp_path / name)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    write_json(tmp_path / "adapter/adapter_config.json", {**config, "base_model_name_or_path": "base"})
    assert open_policy(str(tmp_path / "adapter")).label == "adapter"
    cut(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"policy=.*/adapter: .*/base/model\.safetensors is damaged"):
        open_policy(str(tmp_path / "adapter"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match="adapter: the base of this adapter cannot be found: policy=base: there is"):
        open_policy(str(tmp_path / "adapter"))


def test_a_model_without_a_chat_template_is_refused_when_it_is_opened(runs: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(runs.sft / "model", tmp_path / "silent")
    with pytest.raises(RunError, match="chat:silent: the model has no chat template; allowed: the same without `chat:"):
        open_policy(f"chat:{tmp_path}/silent")


def test_a_run_that_has_not_ended_is_no_policy_and_no_model(
    runs: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs.ppo, tmp_path / "run")
    (tmp_path / "run" / SUMMARY).unlink()
    write_json(tmp_path / "run" / NOTE, {"identity": "some"})
    run = str(tmp_path / "run")
    for main, words in (
        (compare.main, [str(runs.ppo), run]),
        (compare.main, [str(runs.ppo), f"{run}@sft"]),
        (chat.main, [run]),
        (export.main, [run, str(tmp_path / "exported")]),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(words)
        assert leaving.value.code == 2
        said = capsys.readouterr().err.strip()
        assert re.fullmatch(rf"[\w-]+: {run} is a run that has not ended; allowed: a finished one \(.*\)", said)
    with pytest.raises(ConfigError, match=r"sft\.from=.*/run is a run that has not ended"):
        find("sft.from", run)
    assert not (tmp_path / "exported").exists()


def test_a_model_of_words_must_know_what_it_reads() -> None:
    farm = Farm(people=12, eval_prompts=20)
    prompts, tokenizer = list(farm.load("eval")["prompt"]), farm.tokenizer()
    check_knows("it", tokenizer, prompts)
    check_knows("it", None, ["What is this?"])
    check_knows("it", tokenizer, [])
    strange = ["Which rivers flow through Europe today?", "Give three reasons for regular exercise."]
    with pytest.raises(ConfigError, match=r"it: \d+ % of what it would read are no words of its vocabulary"):
        check_knows("it", tokenizer, strange)
    check_knows("it", words_of([*prompts, *strange]), strange)


def test_a_reward_model_of_other_words_judges_nothing(
    runs: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in a comparison nor in a run, whose models are not trained for it."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": row["instruction"], "output": "No."} for row in Farm(eval_prompts=4).load("eval")]
    Path("mine.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as leaving:
        compare.main(["mine.json", "reference", "data.eval_prompts=4", "evaluation.prompts=4",
                      "judge=finished_reward_model", f"judge.folder={runs.reward}"])  # fmt: skip
    assert leaving.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"rlhf-compare: judge.folder={runs.reward}: ")
    assert "are no words of its vocabulary" in said
    assert not list(Path().glob("outputs/comparisons/*"))
