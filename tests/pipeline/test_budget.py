"""`ppo.microbatch_tokens=auto`, `generation.batch_size=auto`: what is chosen, and that a resumed run keeps it."""

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from rlhf.errors import ConfigError, Interrupted, ModelError
from rlhf.files import BUDGET, read_json
from rlhf.models.memory import Work, stage_memory
from rlhf.models.sizes import Sizes
from rlhf.pipeline import preflight as preview
from rlhf.pipeline.fitting import AUTOMATIC, with_numbers
from rlhf.pipeline.plan import Plan
from rlhf.settings import Settings
from rlhf.stages.ppo import PPO
from tests.helpers.calls import before_call
from tests.helpers.command_line import TINY
from tests.helpers.composed_config import composed_plan, composed_settings
from tests.helpers.memory_estimates import sizes_of
from tests.helpers.run_results import assert_identical, collect_run_results

GIB = 2**30
GENERATING = ("generating", "evaluating")


def peak(chosen: Settings, sizes: Sizes, tokens: int) -> int:
    chosen.ppo.microbatch_tokens = tokens
    return stage_memory("ppo", chosen, sizes, Work()).peak_of("updating")


@pytest.mark.parametrize("options", [(), ("ppo.minibatch_size=16", "lora=none"), ("model.max_prompt_tokens=200",)])
def test_the_largest_fitting_budget_is_chosen(options: tuple[str, ...]) -> None:
    chosen = composed_settings("ppo.microbatch_tokens=auto", *options)
    text = chosen.model.max_prompt_tokens + chosen.generation.max_new_tokens
    sizes, budgets = sizes_of(chosen), []
    for free in [0, *(int(GIB * 1.16**i / 2) for i in range(15))]:
        chosen.ppo.microbatch_tokens = "auto"
        budget = with_numbers(chosen, sizes, Work(), free).ppo.microbatch_tokens
        budgets.append(budget)
        assert budget & (budget - 1) == 0
        least, most = budget // 2 < text, budget >= text * chosen.ppo.minibatch_size
        assert least or peak(chosen, sizes, budget) <= AUTOMATIC * free
        assert most or peak(chosen, sizes, 2 * budget) > AUTOMATIC * free
    assert all(one <= other for one, other in pairwise(budgets))  # more memory never means fewer tokens
    assert budgets[0] // 2 < text <= budgets[0]  # at least one whole sequence, however little is free
    assert budgets[-1] // 2 < text * chosen.ppo.minibatch_size <= budgets[-1]  # and never more than a minibatch


def test_the_largest_fitting_batch_of_answers_is_chosen() -> None:
    chosen = composed_settings("generation.batch_size=auto", "ppo.microbatch_tokens=auto", "evaluation.prompts=8")
    sizes, found = sizes_of(chosen), []
    for free in [0, *(int(GIB * 1.004**i * 0.86) for i in range(20))]:
        own = with_numbers(chosen, sizes, Work(), free)
        found.append(own.generation.batch_size)
        assert found[-1] == 1 or stage_memory("ppo", own, sizes, Work()).peak_of(*GENERATING) <= AUTOMATIC * free
        more = -(-64 // (-(-64 // found[-1]) - 1)) if found[-1] < 64 else 64  # the next larger equal part of 64
        own.generation.batch_size = more
        assert found[-1] == 64 or stage_memory("ppo", own, sizes, Work()).peak_of(*GENERATING) > AUTOMATIC * free
    assert all(one <= other for one, other in pairwise(found))
    assert found[0] == 1
    assert len(set(found)) > 3
    assert found[-1] == 64


def test_longer_answers_of_another_stage_mean_fewer_at_a_time() -> None:
    chosen = composed_settings("generation.batch_size=auto")
    sizes, free = sizes_of(chosen), int(1.2 * GIB)
    own = with_numbers(chosen, sizes, Work(("ppo",)), free).generation.batch_size
    simulated = with_numbers(chosen, sizes, Work(("preferences", "ppo"), answer_tokens=4000), free)
    assert simulated.generation.batch_size < own


@pytest.mark.parametrize("key", ["ppo.microbatch_tokens", "generation.batch_size"])
@pytest.mark.parametrize("value", ["0", "-5", "2.5", "null", "all", "[1]", "{a: 1}", "true"])
def test_other_values_are_refused_in_a_sentence(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed_settings(f"{key}={value}")
    assert str(refused.value).startswith(f"{key}=")
    assert str(refused.value).endswith("is not allowed; allowed: a whole number above 0, or auto")


def test_other_stages_accept_numbers_only() -> None:
    with pytest.raises(ConfigError, match=r"^sft.microbatch_tokens=auto is not allowed; allowed: a whole number$"):
        composed_settings("sft.microbatch_tokens=auto")


@pytest.fixture
def make_run_with_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Make a run of the default configuration on a machine with `gib` GiB of free memory."""

    def make(gib: float, *overrides: str) -> Plan:
        monkeypatch.setattr(preview, "available", lambda _: int(gib * GIB))
        return composed_plan(tmp_path, *overrides)

    return make


def settled(run: Plan, **options: object) -> int:
    preview.settle_budget(run, **options)  # type: ignore[arg-type]
    run.folder.mkdir(exist_ok=True)
    preview.keep_budget(run)
    return run.settings.ppo.microbatch_tokens


def test_a_run_goes_on_with_what_it_began_with(
    make_run_with_memory: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    auto = "ppo.microbatch_tokens=auto"
    first = make_run_with_memory(2, auto)
    began = settled(first)
    assert f"auto: {began}; the run needs about" in caplog.text
    assert settled(make_run_with_memory(0.9, auto)) == began  # less memory is free now
    assert f"auto: {began}, as the run began" in caplog.text
    assert settled(make_run_with_memory(2, auto, "seed=1")) == began  # another configuration: the kept value is ignored
    fewer = settled(make_run_with_memory(0.9, auto, "seed=2"))
    assert fewer < began
    assert settled(make_run_with_memory(2, auto, "seed=2")) == fewer
    assert settled(make_run_with_memory(2, auto, "seed=2"), fresh=True) == began
    assert (
        settled(make_run_with_memory(4, auto, "seed=3"), jobs=2) == began
    )  # two processes get half of the memory each


def test_both_numbers_are_kept(make_run_with_memory: Callable[..., Plan], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    both = ("ppo.microbatch_tokens=auto", "generation.batch_size=auto", "generation.max_new_tokens=150")
    first = make_run_with_memory(0.9, *both)
    settled(first)
    began = first.settings.generation.batch_size
    assert 1 < began < first.settings.ppo.rollout_batch_size
    assert f"generation.batch_size=auto: {began}; the run needs about" in caplog.text
    again = make_run_with_memory(2, *both)
    assert settled(again) == first.settings.ppo.microbatch_tokens
    assert again.settings.generation.batch_size == began
    assert again.identity == first.identity
    preview.settle_budget(more := make_run_with_memory(8, *both), fresh=True)
    assert more.settings.generation.batch_size > began


def test_the_identity_contains_auto_and_not_the_chosen_value(make_run_with_memory: Callable[..., Plan]) -> None:
    auto = "ppo.microbatch_tokens=auto"
    one = make_run_with_memory(2, auto)
    picked, before = settled(one), make_run_with_memory(2, auto).identity
    other = make_run_with_memory(0.9, auto)
    assert settled(other, fresh=True) < picked
    assert (
        one.identity == other.identity == before != make_run_with_memory(2, f"ppo.microbatch_tokens={picked}").identity
    )


def test_a_number_is_not_changed(make_run_with_memory: Callable[..., Plan]) -> None:
    assert settled(make_run_with_memory(2, "ppo.microbatch_tokens=auto"), fresh=True) != 300
    run = make_run_with_memory(2, "ppo.microbatch_tokens=300")
    before = (run.folder / BUDGET).read_bytes()
    assert settled(run) == 300
    assert (run.folder / BUDGET).read_bytes() == before


def test_what_cannot_be_estimated_is_refused(
    make_run_with_memory: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.models.sizes.skeleton", lambda *_: None)  # as when the Hub cannot be reached
    with pytest.raises(ModelError, match=r"ppo.microbatch_tokens=auto needs .* cannot be read; allowed: a number"):
        preview.settle_budget(
            make_run_with_memory(2, "ppo.microbatch_tokens=auto", "model=custom", "model.name_or_path=a/b")
        )


@pytest.mark.slow
def test_a_run_can_continue_where_less_memory_is_free(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with the same bits. A dry run shows the value that would be chosen, the summary the one that was."""
    arguments = [*TINY, "ppo.microbatch_tokens=auto", "ppo.minibatch_size=8", f"output_dir={tmp_path}"]
    ample, scarce = 8, 0.75

    def run(gib: float, *more: str) -> int:
        monkeypatch.setattr(preview, "available", lambda _: int(gib * GIB))
        return command(*arguments, *more)[0]

    def shown(gib: float) -> int:
        monkeypatch.setattr(preview, "available", lambda _: int(gib * GIB))
        return preview.describe(composed_plan(tmp_path, *arguments), timed=False)["microbatch_tokens"]

    def leave(stage: PPO, *_: object) -> None:
        if stage.ppo_step == 2:
            raise Interrupted("enough")

    picked, fewer = shown(ample), shown(scarce)
    assert fewer < picked
    assert not list(tmp_path.glob(f"rlhf/*/{BUDGET}"))
    with before_call(PPO, "training_step", leave):
        assert run(ample, "name=stopped") == 75
    assert run(scarce, "name=stopped", "resume=must") == 0
    assert run(ample, "name=whole", "resume=never") == 0
    stopped, whole = (next(tmp_path.glob(f"{name}/*")) for name in ("stopped", "whole"))
    assert read_json(stopped / "summary.json")["microbatch_tokens"] == picked
    assert_identical(collect_run_results([stopped]), collect_run_results([whole]))
    assert run(scarce, "name=fewer", "resume=never") == 0
    other = next(tmp_path.glob("fewer/*"))
    assert read_json(other / "summary.json")["microbatch_tokens"] == fewer
    adapters = [(folder / "model/adapter_model.safetensors").read_bytes() for folder in (stopped, other)]
    assert adapters[0] != adapters[1]  # otherwise the test shows nothing
