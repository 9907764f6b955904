"""The tables and files of a comparison."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rlhf.data.records import Prompt
from rlhf.errors import RunError
from rlhf.evaluation.prompts import instruction_or_prompt
from rlhf.files import read_object, write_json, write_lines
from rlhf.finished.compare.duels import Duel
from rlhf.finished.export.cli import atomic_folder
from rlhf.pipeline.cache import locked
from rlhf.report.ranking import RESAMPLES, Outcomes, Rank, WinRate, misfits, rank_players, unanimous, win_rate
from rlhf.report.tables import NOTHING, Cell, Number, Table, WithInterval
from rlhf.report.text import listing, quoted

log = logging.getLogger(__name__)
COMPARISON, ANSWERS, VERDICTS = "comparison.json", "answers.jsonl", "verdicts.jsonl"
PAGE = "comparison.md"


def results(
    labels: Sequence[str], prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], duels: Sequence[Duel]
) -> dict[str, Any]:
    """All numbers of a comparison: players in the order of their rank, pairs, and pairs that no ranking explains."""
    by_pair: Outcomes = {(duel.first, duel.second): duel.outcomes for duel in duels}
    ranks = rank_players(len(labels), by_pair)
    order = sorted(range(len(labels)), key=lambda i: -ranks[i].strength)
    return {
        "instructions": len(prompts),
        "resamples": RESAMPLES,
        "players": [
            {"label": labels[i], **vars(ranks[i]), "characters": fmean(len(text) for text in answers[i])} for i in order
        ],
        "pairs": [
            {
                "first": labels[duel.first],
                "second": labels[duel.second],
                **vars(win_rate(duel.outcomes)),
                "consistency": duel.consistency,
            }
            for duel in duels
        ],
        "unanimous": [labels[i] for i in unanimous(len(labels), by_pair)],
        "misfits": [
            {"first": labels[i], "second": labels[j], "predicted": predicted}
            for i, j, predicted in misfits(ranks, by_pair)
        ],
    }


def ranking_table(found: Mapping[str, Any]) -> Table:
    """The players by strength."""
    rows: list[list[Cell]] = []
    for one in found["players"]:
        rank = Rank(**{key: one[key] for key in Rank.__dataclass_fields__})
        places = str(rank.best) if rank.best == rank.worst else f"{rank.best} to {rank.worst}"
        rows.append([
            rank.rank, one["label"], WithInterval(rank.strength, rank.low, rank.high, digits=0, signed=True), places,
            Number(100 * rank.first, digits=0), Number(100 * rank.expected), Number(one["characters"], digits=0),
        ])  # fmt: skip
    header = ["rank", "player", "strength (95 %)", "rank (95 %)", "first (%)", "win rate against the others (%)",
              "characters"]  # fmt: skip
    return Table(header, rows, _caption(found))


def _caption(found: Mapping[str, Any]) -> str:
    text = (
        f"Bradley-Terry strengths on Elo's scale (400 points: odds of 10 to 1), 0 on average, ties counting as half a "
        f"win; intervals from {found['resamples']:,} resamples of the {found['instructions']} instructions, so that "
        "they do not cover another training run. “first”: how often a resample puts the player first."
    )
    if found["unanimous"]:
        text += f" {listing(found['unanimous'])} won or lost every comparison, so that the strength is only a bound."
    if found["misfits"]:
        pairs = quoted([f"{one['first']} – {one['second']}" for one in found["misfits"]])
        text += f" The strengths do not explain the win rates of {pairs}."
    return text


def win_rate_table(found: Mapping[str, Any]) -> Table:
    """The win rate in percent of each player (row) against each other (column), in the order of the ranking."""
    labels = [one["label"] for one in found["players"]]
    rates = {}
    for one in found["pairs"]:
        rate = WinRate(**{key: one[key] for key in WinRate.__dataclass_fields__})
        values = (rate.rate, rate.low, rate.high)
        rates[one["first"], one["second"]] = _percent(*values)
        rates[one["second"], one["first"]] = _percent(1 - values[0], 1 - values[2], 1 - values[1])
    rows = [[f"{i + 1}. {row}", *(rates.get((row, column), NOTHING) for column in labels)]
            for i, row in enumerate(labels)]  # fmt: skip
    judged = [one["consistency"] for one in found["pairs"] if not math.isnan(one["consistency"])]
    unjudged = sum(one["unjudged"] for one in found["pairs"])
    caption = (
        "Win rate of the row against the column (players by rank) in percent, with Wilson's 95 % interval; each pair "
        "of answers was judged in both orders"
    )
    caption += f", with the same verdict in {100 * fmean(judged):.0f} % of cases" if judged else ""
    caption += f"; {unjudged} comparisons have no verdict" if unjudged else ""
    return Table(["", *(str(i + 1) for i in range(len(labels)))], rows, f"{caption}.")


def _percent(rate: float, low: float, high: float) -> Cell:
    return NOTHING if math.isnan(rate) else WithInterval(100 * rate, 100 * low, 100 * high)


def write(
    folder: Path,
    found: Mapping[str, Any],
    labels: Sequence[str],
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[str]],
    duels: Sequence[Duel],
) -> None:
    """Write all results into an empty folder: tables, numbers, answers, and the verdict of each comparison."""
    tables = {"ranking": ranking_table(found), "win_rates": win_rate_table(found)}
    for name, table in tables.items():
        (folder / f"{name}.csv").write_text(table.csv(), encoding="utf-8")
    (folder / PAGE).write_text("\n".join(table.markdown() for table in tables.values()), encoding="utf-8")
    said = dict(zip(labels, answers, strict=True))
    rows = (
        {
            "prompt": row.prompt,
            "instruction": instruction_or_prompt(row),
            "answers": {label: str(texts[i]) for label, texts in said.items()},
            "cut": [label for label, texts in said.items() if not getattr(texts[i], "ended", True)],
        }
        for i, row in enumerate(prompts)
    )
    write_lines(folder / ANSWERS, rows)
    verdicts = (
        {
            "first": labels[duel.first],
            "second": labels[duel.second],
            **{name: _numbers(getattr(duel, name)) for name in ("outcomes", "in_order", "reversed")},
        }
        for duel in duels
    )
    write_lines(folder / VERDICTS, verdicts)
    write_json(folder / COMPARISON, found)


def is_made(folder: Path, name: str, identity: str) -> bool:
    """Whether a folder holds these very results, whose numbers are in the file `name`; False if it is new.

    Raises:
        RunError: it holds something else.
    """
    if not folder.exists():
        return False
    if (folder / name).exists() and read_object(folder / name).get("identity") == identity:
        return True
    raise RunError(f"{folder} exists already and holds something else; allowed: a new folder")


def make_once(folder: Path, name: str, identity: str, cached: Path, make: Callable[[Path], None]) -> None:
    """Have `make` write results into a folder, whole or not at all, unless another process makes them just now.

    That the folder can be made is found out first.

    Args:
        folder: where the results go.
        name: of the file with their numbers, as of `is_made`.
        identity: what decides them.
        cached: the cache of the outputs, where the processes wait for each other.
        make: writes all files into the folder that it gets.

    Raises:
        RunError: the folder cannot be made, or holds something else by now.
    """
    with locked(cached / f"{name.partition('.')[0]}-{identity}.lock", f"another process makes {folder}"):
        if is_made(folder, name, identity):
            log.info("%s has been made by another process", folder)
            return
        with atomic_folder(folder) as work:
            make(work)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
