"""The `rlhf-compare` command: any policies against each other, without training anything."""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import INTERRUPTED, KEYBOARD, Interrupted, RunError
from rlhf.errors.explaining import one_sentence_errors
from rlhf.finished.policies import ALLOWED, Policy, RunPolicy, open_policy, place_of

CONFIG_DIR = "a folder with options of your own, such as judge/mine.yaml"


def main(arguments: Sequence[str] | None = None) -> None:
    """`rlhf-compare PLAYER PLAYER… [judge=…] [KEY=VALUE…] [--out FOLDER] [--dry-run]`."""
    parser = argparse.ArgumentParser(
        prog="rlhf-compare",
        description="Judge each player against each other on the evaluation prompts, and rank them.",
        epilog=f"A player is {ALLOWED}. Data, evaluation and judge are those of the first run among the players, "
        "unless overrides such as judge=llm_pool or evaluation.prompts=100 change them.",
    )
    parser.add_argument("words", nargs="+", metavar="PLAYER | KEY=VALUE")
    parser.add_argument("--out", type=Path, help="a new folder (default: comparisons/<digest> among the outputs)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and say what would be done")
    parser.add_argument("--config-dir", type=Path, help=CONFIG_DIR)
    options = parser.parse_intermixed_args(arguments)  # options may stand among the words
    with leaving(parser.prog):
        # imported here so that a wrong option does not wait for torch
        from rlhf.finished.compare.comparing import Comparison
        from rlhf.finished.compare.configuration import compose, split_words
        from rlhf.report.terminal import from_here, show_tables

        named, overrides = split_words(options.words)
        players = open_players(named)
        run = next((player.run for player in players.values() if isinstance(player, RunPolicy)), None)
        comparison = Comparison(players, compose(overrides, run, options.config_dir), options.out)
        if options.dry_run:
            print(comparison.plan())
        else:
            show_tables(comparison.run())
            print(from_here(comparison.folder))


@contextmanager
def leaving(command: str) -> Iterator[None]:
    """Log to the terminal; one sentence and an exit code for whatever ends a command early."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("rlhf").setLevel(logging.INFO)
    with one_sentence_errors(command):
        try:
            yield
        except Interrupted as stopped:
            print(f"{command}: {stopped}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except KeyboardInterrupt:
            print(f"{command}: interrupted; the same command continues", file=sys.stderr)
            raise SystemExit(KEYBOARD) from None


def open_players(words: Sequence[str]) -> dict[str, Policy]:
    """The players by their labels: short ones, or the words themselves where several would have the same.

    Raises:
        RunError: there are fewer than two, one is named twice, or a word names no policy.
        DataError: a file of outputs cannot be read.
    """
    if len(words) < 2:
        raise RunError(f"{len(words)} player is nothing to compare; allowed: two or more, each {ALLOWED}")
    twice = next((word for i, word in enumerate(words) if word in words[:i]), None)
    if twice:
        raise RunError(f"{twice} is named twice; allowed: each player once")
    players = [open_policy(word) for word in words]
    places: dict[Path, str] = {}
    for word, player in zip(words, players, strict=True):
        place = place_of(player)
        if place is not None and (first := places.setdefault(place, word)) != word:
            raise RunError(f"{first} and {word} are the same policy; allowed: each player once")
    labels = [player.label for player in players]
    named = [label if labels.count(label) == 1 else word for label, word in zip(labels, words, strict=True)]
    return dict(zip(named, players, strict=True))
