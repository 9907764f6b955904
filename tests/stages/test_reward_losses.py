"""The reward model's loss over the comparisons of a prompt, its auxiliary losses, and its accuracy by kind."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.data.records import Comparison
from rlhf.stages.batches import SeededBatches
from rlhf.stages.pairs import grouped
from rlhf.stages.reward import accuracy_by_kind, held_out_metrics, warn_of_spread
from tests.helpers.calls import record_calls
from tests.helpers.supervised_stages import reward_stage, words
from tests.helpers.training import fit, quiet_trainer, record_gradients

EOS = 1
ANSWERS = {words(i, 2 + i): [words(10 * i + k, 1 + 2 * k) for k in range(4)] for i in range(3)}
ROWS = [Comparison(q, *pair) for q, answers in ANSWERS.items() for pair in itertools.combinations(answers, 2)]


def gradients(stage: object, rows: list, folder: Path) -> tuple[dict[str, Tensor], float]:
    """The gradients of a step on all rows by name, and its loss."""
    names = [name for name, p in stage.named_parameters() if p.requires_grad]
    with record_gradients() as seen:
        metrics = fit(stage, rows, SeededBatches(len(rows), len(rows), 0, 1), folder)
    pairs = zip(names, seen[0], strict=True)
    return {name: grad for name, grad in pairs if grad is not None}, metrics[-1]["reward/loss"]


def test_comparisons_are_grouped_by_their_prompt(folders: SimpleNamespace) -> None:
    groups = grouped(reward_stage(folders).encode(ROWS))
    assert [group.votes for group in groups] == [[1] * 6] * 3
    assert [pair for group in groups for pair in group.pairs] == reward_stage(folders).encode(ROWS)


@pytest.mark.parametrize("budget", [20, 100000])
def test_each_text_of_a_prompt_goes_through_the_model_once(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    stage = reward_stage(folders, microbatch_tokens=budget, log_every=1, group_prompts=True)
    calls = record_calls(monkeypatch, stage.roles, "last_token_scores")
    gradients(stage, grouped(stage.encode(ROWS)), tmp_path)
    assert [len(scores) for _, scores in calls] == ([4, 4, 4] if budget == 20 else [12])


@pytest.mark.parametrize("budget", [20, 100000])
def test_the_losses_are_those_of_transformers(folders: SimpleNamespace, tmp_path: Path, budget: int) -> None:
    """−log σ of the last scores, plus 0.5 times that of every token's score, plus 2 times the log-likelihood, plus 0.3
    times the square of the last scores' sum.
    """
    coefs = {"lm_coef": 2.0, "token_coef": 0.5, "center_coef": 0.3}
    stage = reward_stage(folders, microbatch_tokens=budget, log_every=1, **coefs)
    model = AutoModelForCausalLM.from_pretrained(folders.sft).eval()
    head = stage.roles.heads["reward"].weight.detach().clone().requires_grad_()

    def read(prompt: str, response: str) -> tuple[Tensor, Tensor]:
        start = len(folders.tokenizer(prompt)["input_ids"])
        ids = torch.tensor([*folders.tokenizer(f"{prompt} {response}")["input_ids"], EOS])
        output = model(input_ids=ids[None], output_hidden_states=True)
        nll = F.cross_entropy(output.logits[0, start - 1 : -1], ids[start:])
        return output.hidden_states[-1][0, start:] @ head[0], nll

    losses = []
    for row in ROWS:
        (ours, our_nll), (theirs, their_nll) = read(row.prompt, row.chosen), read(row.prompt, row.rejected)
        at_tokens = F.softplus(theirs[-1].detach() - ours).mean() + F.softplus(theirs - ours[-1].detach()).mean()
        losses.append(F.softplus(theirs[-1] - ours[-1]) + 0.5 * at_tokens / 2 + 2.0 * (our_nll + their_nll) / 2)
        losses[-1] = losses[-1] + 0.3 * (ours[-1] + theirs[-1]) ** 2
    expected = torch.stack(losses).mean()
    expected.backward()
    found, loss = gradients(stage, grouped(stage.encode(ROWS)), tmp_path)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(found["roles.heads.reward.weight"], head.grad, rtol=1e-4, atol=1e-6)
    for name, parameter in model.named_parameters():
        if f"roles.trunks.base.{name}" in found:
            torch.testing.assert_close(found[f"roles.trunks.base.{name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_penalty_on_the_sum_of_both_scores_holds_what_comparisons_leave_free(
    folders: SimpleNamespace, tmp_path: Path
) -> None:
    """Without it the loss has no gradient for a level that all scores have in common."""
    rows, found = [Comparison("w1", "w2 w3", "w4"), Comparison("w5", "w6", "w7 w8")], []
    for coef in (0.0, 0.3):
        stage = reward_stage(folders, log_every=1, group_prompts=True, center_coef=coef)
        batch = stage.collate(stage.encode(rows))
        level = torch.tensor(2.5, requires_grad=True)
        scores = stage.scores(batch).detach()
        losses = stage._preference_loss(scores + level, batch)
        (gradient,) = torch.autograd.grad(losses.sum(), level)
        found.append((float(gradient), float(4 * coef * (scores + 2.5).sum())))
    assert found[0][0] == pytest.approx(0, abs=1e-6)
    assert found[1][0] == pytest.approx(found[1][1], rel=1e-5)


@pytest.mark.parametrize("auxiliary", [{}, {"center_coef": 0.3}, {"lm_coef": 2.0, "token_coef": 0.5}])
def test_a_comparison_by_several_annotators_counts_as_often(
    folders: SimpleNamespace, tmp_path: Path, auxiliary: dict[str, float]
) -> None:
    """Grouped, they are one comparison with votes: the same gradient as of as many separate comparisons."""
    swapped = Comparison(ROWS[0].prompt, ROWS[0].rejected, ROWS[0].chosen)
    rows = [ROWS[0], swapped, *ROWS[:6], ROWS[0], swapped, *ROWS[6:]]
    stage = reward_stage(folders, log_every=1, group_prompts=True, **auxiliary)
    groups = grouped(stage.encode(rows))
    assert [group.votes for group in groups] == [[3, 2, 1, 1, 1, 1, 1], [1] * 6, [1] * 6]
    found, loss = gradients(stage, groups, tmp_path / "grouped")
    stage = reward_stage(folders, log_every=1, **auxiliary)
    expected, separate = gradients(stage, stage.encode(rows), tmp_path / "separate")
    assert loss == pytest.approx(separate, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_holds_every_text_once_the_longest_first(folders: SimpleNamespace) -> None:
    stage = reward_stage(folders)
    pairs = stage.encode(ROWS)
    batch = stage.collate([*grouped(pairs[:12]), pairs[12]])
    assert (len(batch), len(batch.texts), stage.count(batch)) == (13, 10, 13)
    part = batch.rows(torch.tensor([12, 4, 5]))
    assert len(part.texts) == 5
    for lengths in (batch.texts.lengths.tolist(), part.texts.lengths.tolist()):
        assert lengths == sorted(lengths, reverse=True)
    texts = [tuple(ids[:end]) for ids, end in zip(part.texts.ids.tolist(), part.texts.lengths.tolist(), strict=True)]
    for sides, number in zip(part.sides.tolist(), (12, 4, 5), strict=True):
        assert [texts[row] for row in sides] == [(*prompt, *response) for prompt, response in pairs[number]]
    assert set(part.tensors()) == {"ids", "prompt_lengths", "lengths", "sides", "votes"}


def test_accuracy_is_told_by_kind() -> None:
    rows = [Comparison("p", "long", "x"), Comparison("p", "y", "long"), Comparison("p", "a", "b")]
    assert accuracy_by_kind(rows, [1.0, 1.0, 0.0], ["loop", "loop", "typo"]) == {
        "loop": {"pairs": 2, "accuracy": 1.0, "longer_accuracy": 0.5},
        "typo": {"pairs": 1, "accuracy": 0.5, "longer_accuracy": 0.5},
    }


def test_held_out_margins_are_in_the_order_of_the_rows(folders: SimpleNamespace, tmp_path: Path) -> None:
    stage = reward_stage(folders, microbatch_tokens=30)
    batches = DataLoader(stage.encode(ROWS), batch_size=5, collate_fn=stage.collate)  # type: ignore[arg-type]
    quiet_trainer(tmp_path).validate(stage, batches, verbose=False)
    model = AutoModelForSequenceClassification.from_pretrained(folders.sft, num_labels=1).eval()
    model.score.weight.data.copy_(stage.roles.heads["reward"].weight)

    def score(prompt: str, response: str) -> float:
        ids = [*folders.tokenizer(f"{prompt} {response}")["input_ids"], EOS]
        return float(model(input_ids=torch.tensor([ids])).logits)

    expected = [score(row.prompt, row.chosen) - score(row.prompt, row.rejected) for row in ROWS]
    assert stage.held_out_margins == pytest.approx(expected, abs=1e-5)


def test_measures_of_held_out_comparisons() -> None:
    """Margins 3, −4 and 0; means of the pairs 1, 2 and 6, whose standard deviation is √(14/3)."""
    found = held_out_metrics(torch.tensor([[2.5, -0.5], [0.0, 4.0], [6.0, 6.0]]))
    losses = [math.log1p(math.exp(-margin)) for margin in (3, -4, 0)]
    assert found == pytest.approx(
        {
            "reward/validation_loss": sum(losses) / 3, "reward/accuracy": 0.5, "reward/margin": -1 / 3,
            "reward/prompt_spread": math.sqrt(14 / 3) / math.sqrt(25 / 3),
        }
    )  # fmt: skip
    assert "reward/prompt_spread" not in held_out_metrics(torch.ones(2, 2))


def test_a_reward_model_that_tells_prompts_apart_and_not_answers_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As one of the farm's was: 825 for the answers about crafts, −93 for all others."""
    good, drifted = torch.tensor([[0.4, -0.6], [0.1, 0.5]]), torch.tensor([[-93.0, -94.0], [825.0, 824.0]])
    warn_of_spread("the reward model", held_out_metrics(good))
    assert not caplog.messages
    warn_of_spread("the reward model", held_out_metrics(drifted))
    (message,) = caplog.messages
    assert message.startswith("the scores of the reward model differ 459 times as much between prompts")
    assert message.endswith("try reward.center_coef=0.001")
