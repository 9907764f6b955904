"""Packing as published: texts joined by EOS and cut, beside packs that keep texts apart."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rlhf.data.records import Demonstration
from rlhf.errors import DataError
from rlhf.files import read_json
from rlhf.models.sequences import Sequences
from rlhf.settings import JOINED, SFTSettings
from rlhf.stages.joining import joined
from rlhf.stages.sft import SupervisedFineTuning
from tests.helpers.command_line import TINY
from tests.helpers.tiny_models import EOS, random_sequences, tiny_roles, word_tokenizer

TEXTS = [([3, 4], [5, EOS]), ([6], [7, 8, 9, EOS]), ([], [10, EOS]), ([11, 12, 13], [14, EOS])]


def stage(packing: object, width: int = 16) -> SupervisedFineTuning:
    settings = SFTSettings(
        lr=1e-3, epochs=1, batch_size=2, max_length=width, loss_on="text", packing=packing, validation_size=2,
    )  # fmt: skip
    return SupervisedFineTuning(settings, tiny_roles(), word_tokenizer(), 1)


def test_texts_are_joined_by_eos_and_cut_to_equal_lengths_without_padding() -> None:
    whole = joined(TEXTS, 16, seed=0)[0][1]  # 4 + 5 + 2 + 5 tokens, in a single sequence
    ends = [0, *(i + 1 for i, token in enumerate(whole) if token == EOS)]
    texts = [whole[start:end] for start, end in pairwise(ends)]
    assert sorted(texts) == sorted([*prompt, *response] for prompt, response in TEXTS)  # each whole, an EOS between two
    assert texts != [[*prompt, *response] for prompt, response in TEXTS]  # in a random order
    cut = joined(TEXTS, 5, seed=0)
    assert [token for _, ids in cut for token in ids] == whole[:15]  # across the texts; the last token is dropped
    assert {len(ids) for _, ids in cut} == {5}
    assert len({tuple(joined(TEXTS, 16, seed)[0][1]) for seed in range(9)}) > 2
    with pytest.raises(DataError, match=r"^sft\.packing=joined: the 4 texts have 16 tokens, fewer than one sequence"):
        joined(TEXTS, 17, seed=0)


def test_a_long_text_is_spread_over_sequences_and_not_cut_off() -> None:
    rows = [Demonstration("", " ".join(f"w{3 + (i + j) % 40}" for j in range(50))) for i in range(3)]
    sequences = stage(JOINED).training_rows(rows)
    assert len(sequences) == 3 * 51 // 16
    assert sum(len(ids) for _, ids in stage(True).training_rows(rows)) == 3 * 16  # kept apart, a text is cut to fit
    assert stage(JOINED).encode(rows) == stage(False).encode(rows)  # what is held out is measured alike


def losses_of(batch: Sequences, packing: object) -> float:
    own = stage(packing)
    with torch.no_grad():
        return float(own.loss(batch)[0])


def test_tokens_of_joined_texts_attend_to_the_texts_before_their_own() -> None:
    texts = random_sequences(4, 0, prompt=(0, 0), response=(6, 9)).responses()
    pairs: list[tuple[list[int], list[int]]] = [([], ids) for ids in texts]
    width = sum(map(len, texts))
    apart = stage(True, width).collate(pairs)
    together = stage(JOINED, width).collate([([], [token for ids in texts for token in ids])])
    assert apart.position_ids is not None
    assert together.position_ids is None
    assert together.ids.shape == (1, width)
    # the reference: the plain language model on the whole row
    own = stage(JOINED, width)
    with torch.no_grad(), own.roles.using_adapter("policy") as trunk:
        logprobs = trunk(input_ids=together.ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = -logprobs.gather(-1, together.ids[0, 1:, None]).sum()
    assert losses_of(together, JOINED) == pytest.approx(float(expected), rel=1e-5)
    assert losses_of(together, JOINED) != pytest.approx(losses_of(apart, True), rel=1e-2)


def test_a_run_with_joined_texts_counts_sequences(command: Callable, tmp_path: Path) -> None:
    code, _, err = command(
        *TINY, "stage=sft", "sft.packing=joined", "sft.loss_on=text", "sft.epochs=1", "sft.batch_size=4",
    )  # fmt: skip
    assert code == 0, err
    summary = read_json(next(Path("outputs/rlhf").glob("*/summary.json")))
    lines = Path(next(Path("outputs/rlhf").glob("*/metrics.jsonl"))).read_text().splitlines()
    count = summary["joined"]["sequences"]
    assert summary["joined"]["texts"] == 200
    assert 1 < count < 200  # several texts share a sequence
    assert json.loads(lines[-1])["step"] == -(-count // 4)
    assert summary["metrics"]["sft/loss"] < summary["metrics"]["sft/validation_loss_before"]
