"""Samples side by side: which are shown, and what changed in them."""

from pathlib import Path

from rlhf.report.cli import make_report
from rlhf.report.runs import load
from rlhf.report.samples import PROMPTS, changes, samples
from tests.helpers.made_up_sweeps import write_lines, write_run, write_sweep


def test_changes_are_told_by_words() -> None:
    assert changes("He plays the piano.", "He plays the horn. He sells oats.") == [
        ("same", "He plays the"), ("gone", "piano."), ("new", "horn. He sells oats."),
    ]  # fmt: skip
    # a word or two in common between changes would cut both texts to pieces
    assert changes("Hola is a tailor and lives in Ham.", "Hola sells grapes and raises pigs.") == [
        ("same", "Hola"), ("gone", "is a tailor and lives in Ham."), ("new", "sells grapes and raises pigs."),
    ]  # fmt: skip
    assert [piece.kind for piece in changes("x a b c y", "z a b c w")] == ["gone", "new", "same", "gone", "new"]
    assert changes("a b", "a b") == [("same", "a b")]
    assert changes("", "a") == [("new", "a")]
    assert changes("a", "") == [("gone", "a")]
    assert changes("one\ntwo", "one\nthree") == [("same", "one \n"), ("gone", "two"), ("new", "three")]


def test_every_row_answers_the_first_instructions_with_the_run_of_the_lowest_seeds(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", variants=["lora_kl", "lora_none"])
    found = samples(load([folder]))
    assert [sample.prompt for sample in found] == [f"Tell me about <{i}>.\n" for i in range(PROMPTS)]
    assert [answer.row for answer in found[0].answers] == ["SFT", "variant=lora_kl", "variant=lora_none"]
    assert found[0].reference == "The reference."
    # of the answers in made-up runs the step differs from that of their SFT model's
    assert [piece.kind for piece in found[0].answers[1].pieces] == ["same", "gone", "new", "same"]


def test_only_scores_that_were_recorded_have_a_column(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write_run(folder / "a", "lora_kl", 1)
    lines = [
        {"step": step, "prompt": "Who?", "response": text, "stated": 3, "true": true, "reward": None}
        for step, text, true in ((0, "Nobody.", 1), (50, "<Somebody>.", 2))
    ]
    write_lines(folder / "a" / "samples.jsonl", lines)
    (sample,) = samples(load([folder]))
    assert sample.columns == ["true facts"]
    assert [answer.scores for answer in sample.answers] == [["1 of 3"], ["2 of 3"]]
    page = make_report([folder]).read_text()
    assert "<del>Nobody.</del> <ins>&lt;Somebody&gt;.</ins>" in page
    assert "a fixed rule, by which nothing is picked" in page
