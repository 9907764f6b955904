"""One word names a policy: its answers are those of the model, the file or the data set that it means."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.options import parse_template
from rlhf.data.records import Prompt
from rlhf.errors import ConfigError, DataError, RunError
from rlhf.files import read_json, write_json
from rlhf.finished.policies import open_policy
from rlhf.models.export import save_model
from rlhf.models.tokenizing import Response, keep_template
from rlhf.rollout.native import NativeEngine
from rlhf.rollout.sample import rollout
from rlhf.settings import Settings
from tests.helpers.composed_config import composed_settings
from tests.helpers.finished_runs import TEMPLATE, finished_outputs
from tests.helpers.hub_cache import on_the_hub
from tests.helpers.tiny_models import tiny_model, word_tokenizer

SOURCE = SimpleNamespace(template=parse_template(TEMPLATE))
WORDS = ["w9", "w7 w8", "w11", "w12 w13 w14", "w20"]
PROMPTS = [Prompt(SOURCE.template.render(text), f"answer {i}", text) for i, text in enumerate(WORDS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    found = finished_outputs(tmp_path_factory.mktemp("work") / "outputs")
    best = found.ppo.with_name("best")
    shutil.copytree(found.ppo, best)
    (best / "checksums.json").unlink()
    shutil.copytree(found.other / "model", best / "model_best")
    shutil.copytree(found.other / "model", best / "kept/step-000020")
    alone = found.full.with_name("alone")  # as runs are recorded since they name their SFT model
    shutil.copytree(found.full, alone)
    summary = read_json(alone / "summary.json")
    write_json(
        alone / "summary.json", {**{k: v for k, v in summary.items() if k != "reward_model"}, "sft_model": "sft-0"}
    )
    found.alone = alone
    found.best = best
    return found


@pytest.fixture(scope="module")
def settings() -> Settings:
    return composed_settings("evaluation.max_new_tokens=6", "generation.batch_size=2")


def answers_of(runs: SimpleNamespace, role: str) -> list[str]:
    """What a role of the models in memory says to PROMPTS, greedily."""
    generation = composed_settings("generation.batch_size=2").generation
    tokenizer = keep_template(word_tokenizer(), SOURCE)
    made = rollout(
        NativeEngine(1), runs.roles, role, tokenizer, [row.prompt for row in PROMPTS], generation,
        torch.Generator(), 0.0, 6,
    )  # fmt: skip
    return list(made.responses)


@pytest.mark.parametrize(
    ("word", "role", "label"),
    [
        ("{ppo}", "policy", "ppo"),
        ("{ppo}/model", "policy", "ppo"),
        ("{best}/model_best", "value", "best/model_best"),
        ("{best}/kept/step-000020", "value", "best/kept/step-000020"),
        ("{best}@sft", "reference", "best@sft"),
        ("{alone}@sft", "reference", "alone@sft"),
        ("{full}", "policy", "full"),
        ("{full}@sft", "reference", "full@sft"),
        ("{sft}", "reference", "sft-0"),
        ("{ppo}/../other", "value", "other"),
    ],
)
def test_a_run_answers_with_its_own_model(
    runs: SimpleNamespace, settings: Settings, word: str, role: str, label: str
) -> None:
    policy = open_policy(word.format(**vars(runs)))
    answers = policy.answers(PROMPTS, settings, SOURCE)
    assert answers == answers_of(runs, role)
    assert policy.label == label
    assert all(isinstance(answer, Response) and answer.ids for answer in answers)
    assert len({*map(tuple, (answers_of(runs, name) for name in ("policy", "value", "reference")))}) == 3


def test_a_link_gives_a_run_with_a_long_name_a_short_one(runs: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(runs.ppo)
    assert open_policy(str(tmp_path / "mine")).label == "mine"
    assert open_policy(f"{tmp_path}/mine@sft").label == "mine@sft"


def test_a_run_reads_prompts_in_the_template_that_it_was_trained_with(
    runs: SimpleNamespace, settings: Settings
) -> None:
    other = SimpleNamespace(template=parse_template({**TEMPLATE, "without_input": "w40 {instruction} w41"}))
    prompts = [Prompt(other.template.render(row.instruction), "", row.instruction) for row in PROMPTS]
    assert open_policy(str(runs.ppo)).answers(prompts, settings, other) == answers_of(runs, "policy")
    outside = open_policy(str(exported(runs, runs.ppo.parent / "exported")))
    assert outside.answers(prompts, settings, other) != answers_of(runs, "policy")  # knows of no template


def exported(runs: SimpleNamespace, folder: Path) -> Path:
    if not folder.exists():
        save_model(runs.roles.copy_trunk("policy"), word_tokenizer(), folder)
    return folder


def test_a_model_from_elsewhere_answers_in_the_template_of_the_data(
    runs: SimpleNamespace, settings: Settings, tmp_path: Path
) -> None:
    policy = open_policy(str(exported(runs, tmp_path / "mine")))
    assert policy.answers(PROMPTS, settings, SOURCE) == answers_of(runs, "policy")
    assert policy.label == "mine"


def test_an_adapter_from_elsewhere_finds_its_base(runs: SimpleNamespace, settings: Settings, tmp_path: Path) -> None:
    """The run's own adapter as others would have it, its base beside it; and one of a kind that no run trains."""
    shutil.copytree(runs.sft / "model", tmp_path / "base")
    shutil.copytree(runs.ppo / "model", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    policy = open_policy(str(tmp_path / "adapter"))
    assert policy.answers(PROMPTS, settings, SOURCE) == answers_of(runs, "policy")
    # weights beside the LoRA (the head) and DoRA: an adapter is whatever peft can read
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wanted = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True)
    tuned = get_peft_model(base, wanted)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    tuned.save_pretrained(tmp_path / "dora")
    save_model(tuned.merge_and_unload(), word_tokenizer(), tmp_path / "merged")
    (dora, merged) = (open_policy(str(tmp_path / name)) for name in ("dora", "merged"))
    said = dora.answers(PROMPTS, settings, SOURCE)
    assert said == merged.answers(PROMPTS, settings, SOURCE)
    assert said != answers_of(runs, "reference")


def test_a_model_of_the_hub_is_that_of_its_revision(
    runs: SimpleNamespace, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    first, last = "1" * 40, "2" * 40
    on_the_hub(tmp_path, "us/model", {first: runs.sft / "model", last: exported(runs, tmp_path / "mine")})
    said = {word: open_policy(word).answers(PROMPTS, settings, SOURCE) for word in ("us/model", "us/model@v1")}
    assert said == {"us/model": answers_of(runs, "policy"), "us/model@v1": answers_of(runs, "reference")}
    assert open_policy("us/model").identity() != open_policy("us/model@v1").identity()
    assert open_policy("us/model").identity() == open_policy(f"us/model@{last}").identity()


def test_a_chat_model_can_read_its_own_template(settings: Settings, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for one in messages %}w5 {{ one['content'] }}{% if one['role'] == 'user' %} w6{% endif %}{% endfor %}"
    )
    save_model(tiny_model(), tokenizer, tmp_path / "chatty")
    other = SimpleNamespace(template=parse_template({**TEMPLATE, "without_input": "w40 {instruction} w41"}))
    rows = [Prompt(other.template.render(row.instruction), "", row.instruction) for row in PROMPTS]
    untemplated, own = (
        open_policy(f"{prefix}{tmp_path}/chatty").answers(rows, settings, other) for prefix in ("", "chat:")
    )
    templated = open_policy(f"{tmp_path}/chatty").answers(PROMPTS, settings, SOURCE)
    assert own == templated != untemplated
    save_model(tiny_model(), word_tokenizer(), tmp_path / "silent")
    with pytest.raises(RunError, match="chat:silent: the model has no chat template; allowed: the same without"):
        open_policy(f"chat:{tmp_path}/silent").answers(rows, settings, SOURCE)


def test_a_file_of_outputs_is_matched_by_instruction(settings: Settings, tmp_path: Path) -> None:
    rows = [{"instruction": text, "output": f"mine {text}", "generator": "ours"} for text in reversed(WORDS)]
    rows += [{"instruction": "w50", "input": "w51", "output": "apart", "generator": "ours"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({**row, "generator": i}) + "\n" for i, row in enumerate(rows))
    prompts = [*PROMPTS, Prompt("w5 w50 w51 w6", "", "w50\n\nw51")]
    for name, label in (("a.json", "ours"), ("b.jsonl.gz", "b")):
        policy = open_policy(str(tmp_path / name))
        assert policy.label == label
        assert policy.answers(prompts, settings, SOURCE) == [f"mine {text}" for text in WORDS] + ["apart"]
    policy = open_policy(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"a\.json has no output for 1 of the 1 evaluation instructions, such as 'w1'"):
        policy.answers([Prompt("w5 w1 w6", "", "w1")], settings, SOURCE)


def test_an_instruction_that_occurs_twice_has_its_outputs_in_order(settings: Settings, tmp_path: Path) -> None:
    rows = [{"instruction": "w1", "output": "first"}, {"instruction": "w1", "output": "second"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prompts = [Prompt("w1", "", "w1")] * 2
    assert open_policy(str(tmp_path / "a.json")).answers(prompts, settings, SOURCE) == ["first", "second"]


def test_the_references_are_those_of_the_data(settings: Settings) -> None:
    assert open_policy("reference").answers(PROMPTS, settings, SOURCE) == [f"answer {i}" for i in range(5)]
    with pytest.raises(DataError, match="1 of 6 evaluation prompts have no reference output, such as 'w1'"):
        open_policy("reference").answers([*PROMPTS, Prompt("w5 w1 w6", "", "w1")], settings, SOURCE)


def test_what_decides_the_answers_is_the_identity(runs: SimpleNamespace, tmp_path: Path) -> None:
    words = [str(runs.ppo), str(runs.other), f"{runs.ppo}@sft", "reference", str(exported(runs, tmp_path / "mine"))]
    found = [json.dumps(open_policy(word).identity(), sort_keys=True) for word in words]
    assert len(set(found)) == len(words)
    assert open_policy(f"{runs.best}/model_best").identity() == open_policy(str(runs.other)).identity()
    assert open_policy(f"{runs.full}@sft").identity() == open_policy(str(runs.sft)).identity()


def test_a_wrong_word_is_refused_in_a_sentence(runs: SimpleNamespace, tmp_path: Path) -> None:
    classifier = AutoModelForSequenceClassification.from_config(tiny_model().config)
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.json").write_text('[{"instruction": "w1"}]')
    (tmp_path / "notes.md").write_text("text")
    shutil.copytree(runs.ppo / "model", tmp_path / "lost")
    config = json.loads((tmp_path / "lost/adapter_config.json").read_text())
    (tmp_path / "lost/adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    wrong = {
        "./nowhere": "there is no such file or folder; allowed: a finished run (RUN or RUN/model, RUN/model_best, RUN",
        "us/nowhere": "policy=us/nowhere: there is no such folder, and the Hub does not give it",
        "us/nowhere@v2": "policy=us/nowhere@v2: there is no such folder, and the Hub does not give it",
        "word": "there is no such file or folder",
        f"{tmp_path}/nowhere.json": "does not exist",
        f"{tmp_path}/rows.json": "row 1: it has no text as instruction or output; allowed: rows in AlpacaEval's",
        f"{tmp_path}/notes.md": "has an unknown suffix",
        f"{tmp_path}/empty": "has no config.json; allowed: the folder or Hub id of a model",
        f"{tmp_path}/classifier": "which generates no text; allowed: a causal language model",
        f"{tmp_path}/lost": "policy=/gone/base: there is no such folder",
        str(runs.reward): "is a reward model, which generates no text",
        f"{runs.ppo}/model_best": "has no model_best",
        f"{runs.best}/kept/step-000007": "has no kept/step-000007; allowed: ",
        f"{tmp_path}/empty@sft": "is not the folder of a finished run",
        f"{runs.ppo / 'model'}@main": "only models on the Hub have revisions",
    }
    for word, said in wrong.items():
        with pytest.raises((RunError, DataError, ConfigError)) as caught:
            open_policy(word)
        assert said in str(caught.value), word
        assert "\n" not in str(caught.value)


def test_opening_does_not_wait_for_torch(runs: SimpleNamespace) -> None:
    code = "import sys; from rlhf.finished.policies import open_policy; open_policy(sys.argv[1]); " + (
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(runs.ppo)], check=False).returncode == 0
