"""The `rlhf-agreement` command: how far a judge agrees with the annotations of pairs."""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf.errors import ConfigError, DataError, RunError
from rlhf.files import read_lines, read_object, write_json, write_lines
from rlhf.finished.compare.cli import CONFIG_DIR, leaving
from rlhf.report.tables import NOTHING, Table, WithInterval
from rlhf.report.terminal import from_here, show_tables

AGREEMENT, PAGE, VERDICTS = "agreement.json", "agreement.md", "verdicts.jsonl"


def main(arguments: Sequence[str] | None = None) -> None:
    """`rlhf-agreement ANNOTATIONS [judge=…] [KEY=VALUE…] [--pairs N] [--out FOLDER] [--dry-run]`."""
    parser = argparse.ArgumentParser(
        prog="rlhf-agreement",
        description="Have a judge compare pairs that are annotated already: accuracy and Cohen's kappa.",
        epilog="ANNOTATIONS are preference or preference_validation (the comparisons of the data set), the "
        "…_pairs.jsonl of simulated preferences, a file in AlpacaFarm's format, or a folder of rlhf-compare.",
    )
    parser.add_argument("words", nargs="+", metavar="ANNOTATIONS | KEY=VALUE")
    parser.add_argument("--pairs", type=int, help="judge only the first so many (default: all)")
    parser.add_argument("--out", type=Path, help="a new folder (default: agreements/<digest> among the outputs)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and say what would be done")
    parser.add_argument("--config-dir", type=Path, help=CONFIG_DIR)
    options = parser.parse_intermixed_args(arguments)  # options may stand among the words
    with leaving(parser.prog):
        # imported here so that a wrong option does not wait for torch
        from rlhf.finished.compare.configuration import compose, split_words

        named, overrides = split_words(options.words)
        if len(named) != 1:
            raise RunError(f"{len(named)} files of annotations are named; allowed: one")
        if options.pairs is not None and options.pairs < 1:
            raise RunError(f"--pairs {options.pairs} is not allowed; allowed: a whole number above 0")
        config = compose(overrides, None, options.config_dir)
        folder = measure(named[0], config, options.pairs, options.out, options.dry_run)
        if folder:
            show_tables([_table_in(folder)])
            print(from_here(folder))


def measure(word: str, config: Any, limit: int | None, out: Path | None, dry: bool = False) -> Path | None:
    """Judge annotated pairs, unless that has been done already; return the folder of the results.

    Args:
        word: the annotations, see `rlhf.finished.compare.annotations`.
        config: the composed configuration.
        limit: how many pairs, from the first one on; None for all.
        out: where to write; None for `<output_dir>/agreements/<digest>`.
        dry: judge and write nothing, print what would be done, and return None.

    Raises:
        UserError: annotations, configuration or judge cannot be used.
        Interrupted: the judge's endpoint cannot be reached.
    """
    from rlhf.data.saved_preferences import PREFERENCE_SPLITS
    from rlhf.finished.compare.annotations import read_annotations
    from rlhf.finished.compare.configuration import check_judge
    from rlhf.finished.compare.duels import hash_of
    from rlhf.finished.compare.results import is_made, make_once
    from rlhf.pipeline import identity
    from rlhf.pipeline.config import data_source, settings_of
    from rlhf.pipeline.evaluating import check_judge_reads
    from rlhf.pipeline.numerics import settle_numerics
    from rlhf.pipeline.quiet import quieten

    quieten()
    settle_numerics(config.trainer.get("deterministic"))
    settings_of(config)  # checks all keys
    source, cached = data_source(config), Path(config.output_dir) / "cache"
    keys = check_judge(config, source)
    if word in PREFERENCE_SPLITS and hasattr(source, "check"):
        source.check()
    pairs = [pair for pair in read_annotations(word, source)[:limit] if pair.first != pair.prompt.reference_output]
    if not pairs:
        raise DataError(f"{word} has no pair of two different answers")
    if all(pair.outcome is None for pair in pairs):
        raise ConfigError(f"{word} has no verdict on any pair; allowed: annotated pairs")
    check_judge_reads(config, [text for pair in pairs for text in (pair.prompt.prompt, pair.first)])
    texts = hash_of([[row.prompt.prompt, row.first, row.prompt.reference_output, row.outcome] for row in pairs])
    name = identity.digest({"judge": identity.decisive(keys), "pairs": texts}, known=cached / "digests")
    folder = out or cached.parent / "agreements" / name
    made = is_made(folder, AGREEMENT, name)
    if dry:
        judge, new = str(keys["_target_"]).rpartition(".")[2], f"would write {folder}"
        print(f"{folder} has been made already" if made else f"{judge} would judge {len(pairs)} pairs\n{new}")
        return None
    if not made:
        about = {"annotations": word, "identity": name, "judge": keys}
        make_once(folder, AGREEMENT, name, cached, lambda work: _make(work, config, pairs, about))
    return folder


def _make(work: Path, config: Any, pairs: Sequence[Any], about: Mapping[str, Any]) -> None:
    """Judge the pairs and write the results into a folder."""
    from rlhf.finished.compare.duels import ConfiguredJudge
    from rlhf.pipeline.config import data_source
    from rlhf.report.agreement import agreement

    judge = ConfiguredJudge(config, data_source(config), Path(config.output_dir) / "cache")
    prompts, first = [pair.prompt for pair in pairs], [pair.first for pair in pairs]
    verdicts = {
        "annotations": [pair.outcome for pair in pairs],
        "judge": list(judge(prompts, first)),
        "longer answer": [_longer(pair.first, pair.prompt.reference_output) for pair in pairs],
    }
    compared = [("judge", "annotations"), ("longer answer", "annotations"), ("judge", "longer answer")]
    instructions = [row.instruction or row.prompt for row in prompts]
    found = {(a, b): agreement(verdicts[a], verdicts[b], instructions) for a, b in compared}
    (work / PAGE).write_text(table(found, len(set(instructions))).markdown(), encoding="utf-8")
    rows = zip(prompts, first, *verdicts.values(), strict=True)
    write_lines(work / VERDICTS, (
        {"instruction": row.instruction or row.prompt, "first": text, "second": row.reference_output,
         **dict(zip(verdicts, given, strict=True))}
        for row, text, *given in rows
    ))  # fmt: skip
    numbers = [{"between": pair, **vars(one)} for pair, one in found.items()]
    write_json(work / AGREEMENT, {**about, "agreement": numbers, "usage": judge.usage})


def _table_in(folder: Path) -> Table:
    """The table of the agreements in a folder."""
    found = read_object(folder / AGREEMENT, agreement=list)["agreement"]
    by_pair = {(a, b): SimpleNamespace(**one) for one in found for a, b in [one["between"]]}
    return table(by_pair, len({line["instruction"] for line in read_lines(folder / VERDICTS)}))


def table(found: Mapping[tuple[str, str], Any], instructions: int) -> Table:
    """The agreements; `found` maps two judges to their agreement."""

    def cell(value: tuple[float, float, float], scale: int, digits: int) -> Any:
        share, low, high = (scale * x for x in value)
        return NOTHING if math.isnan(share) else WithInterval(share, low, high, digits)

    rows = [
        [
            f"{pair[0]} – {pair[1]}", one.pairs, f"{one.ties[0]} / {one.ties[1]}", one.unjudged,
            cell(one.accuracy, 100, 1), cell(one.decided, 100, 1), cell(one.kappa, 1, 2),
        ]
        for pair, one in found.items()
    ]  # fmt: skip
    header = ["between", "pairs", "ties", "unjudged", "same verdict (%)", "without ties (%)", "Cohen's κ"]
    caption = (
        f"A verdict is first, second or tie; 95 % intervals over {instructions} instructions. “longer answer” prefers "
        "the longer one by characters."
    )
    return Table(header, rows, caption)


def _longer(first: str, second: str) -> float:
    return 0.5 if len(first) == len(second) else float(len(first) > len(second))
