"""Data sets from the Hub or from files in the formats that are common there, recognised or mapped by columns."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median_low
from typing import Any, ClassVar

import pyarrow
from datasets import Dataset

from rlhf.data.choices import Choosing
from rlhf.data.column_maps import ALLOWED, MappedSource, parse_columns
from rlhf.data.conversations import AssistantTurns, Markers, ToolTurns
from rlhf.data.options import as_list, parse_choice, parse_positive
from rlhf.data.records import SPLITS, ScoredComparison, Split
from rlhf.data.records import columns as columns_of
from rlhf.data.row_formats import Reader
from rlhf.data.row_records import HELD_OUT, KeptPrompt, ToRecords
from rlhf.data.sources import Source
from rlhf.data.split_sources import SplitSources
from rlhf.data.splitting import Shares
from rlhf.data.threads import Pairing
from rlhf.errors import DataError

COMPARISONS: tuple[Split, ...] = ("preference", "preference_validation")
KEEPING: tuple[Split, ...] = ("prompts", "eval")  # splits whose rows may keep further columns


class Hub(SplitSources):
    """Data in the formats of `rlhf.data.column_maps.FORMATS`, with sources for each split; see docs/data.md.

    Args:
        template: What `rlhf.data.options.parse_template` accepts.
        root: The folder of the files.
        sft, sft_validation, preference, preference_validation, prompts, eval: The source of the split, or a list of
            them: what `rlhf.data.sources.Source.parse` accepts, or a mapping with that as `source` and with
            `columns` of its own.
        columns: Mapping from field to column, for sources without `columns` of their own.
        verbatim: Whether texts are used as they are: neither put into the template nor tidied.
        turn_markers: What precedes the turns of a conversation that is one text (`user` and `assistant`), or None.
        assistant_turns: `last` makes a demonstration of the last turn of a conversation, `all` of each.
        tool_turns: `refuse` makes a conversation with a tool a bad row; `text` keeps calls and results as text.
        choices: Values of the field `preference` that mean `first`, `second` and `tie`; None for 1, 2 and 0.
        ties: `skip` makes equal answers no pair; `first` prefers the one that comes first, `random` either.
        min_margin: Least difference between the scores of the answers of a pair.
        max_pairs_per_prompt: Most pairs of a row's answers; if there are more, some are drawn.
        held_out: Share of the prompts of `sft` and `preference` to hold out for validation, or a mapping to shares
            from some of `HELD_OUT`.
        seed: Selects the prompts held out, the pairs drawn and the random ties.
        on_bad_row: `skip` counts and skips bad rows; `fail` raises an error.
        deduplicate: Whether a row with the same records as an earlier one of its split is a bad row.
        exclude_eval_instructions: Whether a training row whose instruction is in `eval` is a bad row.
        keep: Columns of the rows of `prompts` and `eval` to keep as they are, for a function that rewards the answers.
        max_rows: Most rows per split: a number, a mapping from split to number, or None. The first rows are taken.
    """

    option: ClassVar[str] = "hub"
    record_classes: Mapping[Split, type] = dict.fromkeys(COMPARISONS, ScoredComparison)

    def __init__(
        self,
        *,
        template: Any,
        root: str = ".",
        sft: Any = None,
        sft_validation: Any = None,
        preference: Any = None,
        preference_validation: Any = None,
        prompts: Any = None,
        eval: Any = None,
        columns: Any = None,
        verbatim: bool = False,
        turn_markers: Any = None,
        assistant_turns: str = "last",
        tool_turns: str = "refuse",
        choices: Any = None,
        ties: str = "skip",
        min_margin: float = 0.0,
        max_pairs_per_prompt: int = 10,
        held_out: Any = None,
        seed: int = 0,
        on_bad_row: str = "skip",
        deduplicate: bool = True,
        exclude_eval_instructions: bool = True,
        keep: Any = None,
        max_rows: Any = None,
    ) -> None:
        """Check the configuration, whose values may be anything (hence `Any`); no file is read.

        Raises:
            DataError: a malformed value.
        """
        # 1. The sources of each split; a split that is held out has those of its training split.
        specs: tuple[Any, ...] = (sft, sft_validation, preference, preference_validation, prompts, eval)
        given: dict[Split, Any] = {split: spec for split, spec in zip(SPLITS, specs, strict=True) if spec}
        self._held_out = _parse_held_out(held_out, given, seed)
        given |= {HELD_OUT[split]: given[split] for split in self._held_out}
        self._keep = _parse_keep(keep)
        if self._keep:
            self.record_classes = {**self.record_classes, **dict.fromkeys(KEEPING, KeptPrompt)}
        sources = {split: _parse_sources(spec, root, columns, split) for split, spec in given.items()}
        super().__init__(sources, template=template, on_bad_row=on_bad_row, deduplicate=deduplicate,
                         exclude_eval_instructions=exclude_eval_instructions, max_rows=max_rows)  # fmt: skip
        # 2. How rows are read.
        choosing = Choosing.parse(choices, ties, min_margin, seed)
        tools = parse_choice(tool_turns, ToolTurns, "tool_turns")
        self._reader = Reader(choosing, tools, Markers.parse(turn_markers), verbatim)
        self._pairing = Pairing(parse_positive(max_pairs_per_prompt, "data.max_pairs_per_prompt"), seed)
        self._all_turns = parse_choice(assistant_turns, AssistantTurns, "assistant_turns") == "all"

    @property
    def concerns(self) -> dict[str, tuple[Split, ...]]:
        """The splits that each split's source affects, also those that it is held out for; see `DataSource`."""
        found = {**super().concerns, "keep": KEEPING}
        for split in self._held_out:
            found[split] = (*found[split], *found[HELD_OUT[split]])
        return found

    def kinds(self) -> list[str]:
        """For each row of `preference_validation` whether its margin is small or large; empty if none has a margin."""
        rows = self.load("preference_validation")
        margins = list(rows["margin"]) if "margin" in rows.column_names else []
        known = sorted(margin for margin in margins if margin is not None)
        if not known or known[0] == known[-1]:
            return []
        middle = min(median_low(known), max(margin for margin in known if margin < known[-1]))
        names = {True: f"margin above {middle:g}", False: f"margin up to {middle:g}"}
        return ["no margin" if margin is None else names[margin > middle] for margin in margins]

    def _read(self, split: Split) -> Dataset:
        rows = super()._read(split)
        if "kept" in rows.column_names:
            return _with_columns(rows, split)
        scored = "margin" in rows.column_names and any(margin is not None for margin in rows["margin"])
        return rows if scored or split not in COMPARISONS else rows.remove_columns("margin")

    def _to_record(self, split: Split, excluded: set[str]) -> ToRecords:
        training = next((train for train, held in HELD_OUT.items() if held == split), split)
        shares = self._held_out.get(training)
        chosen = (self.template, self._reader, self._pairing, self._all_turns, excluded, shares)
        return ToRecords(split, *chosen, self._keep if split in KEEPING else ())


def _parse_keep(keep: Any) -> tuple[str, ...]:
    """Parse the names of columns to keep; null is the same as none.

    Raises:
        DataError: any other value, or a column that a prompt has anyway.
    """
    names = () if keep is None else keep
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"data.keep={keep!r} is not allowed; allowed: a list of names of columns, or null.")
    taken = sorted({*columns_of("prompts"), "kept"} & set(names))
    if taken:
        raise DataError(f"data.keep={keep!r}: a prompt has a column {taken[0]} of its own; allowed: other columns.")
    return tuple(names)


def _with_columns(rows: Dataset, split: Split) -> Dataset:
    """Rows of `KeptPrompt` with the columns that they kept; values of several types become JSON.

    Raises:
        DataError: a column has no value in any row.
    """
    kept = [json.loads(text) for text in rows["kept"]]
    rows = rows.remove_columns("kept")
    for name in kept[0]:
        values = [row[name] for row in kept]
        if all(value is None for value in values):
            raise DataError(f"data.keep: no row of data.{split} has a column {name}; allowed: names of its columns.")
        try:
            rows = rows.add_column(name, values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            rows = rows.add_column(name, [None if value is None else json.dumps(value) for value in values])
    return rows


def _parse_sources(specs: Any, root: str, columns: Any, split: Split) -> tuple[MappedSource, ...]:
    """Parse a source or a list of sources.

    Raises:
        DataError: one is malformed.
    """
    sources = []
    for spec in as_list(specs):
        own = spec if isinstance(spec, Mapping) and "source" in spec else {"source": spec}
        if not set(own) <= {"source", "columns"}:
            raise DataError(f"data.{split} has the keys {', '.join(map(str, own))}; allowed: source and columns.")
        names = parse_columns(own.get("columns", columns))
        sources.append(MappedSource(Source.parse(own["source"], Path(root).expanduser()), names, ALLOWED[split]))
    return tuple(sources)


def _parse_held_out(held_out: Any, given: Mapping[Split, Any], seed: int) -> dict[Split, Shares]:
    """For each training split of which rows are held out, what tells them apart.

    Raises:
        DataError: not a share, or a mapping with another split or one that rows cannot be held out of.
    """
    if not held_out:
        return {}
    shares = held_out
    if not isinstance(held_out, Mapping):
        shares = {split: held_out for split in ("sft", "preference") if split in given and HELD_OUT[split] not in given}
    for split, share in shares.items():
        if split not in HELD_OUT or type(share) not in (int, float) or not 0 < share < 1:
            raise DataError(
                f"data.held_out={held_out!r} is not allowed; allowed: a share between 0 and 1, or a mapping to shares "
                f"from some of {', '.join(HELD_OUT)}."
            )
        if split not in given or HELD_OUT[split] in given:
            problem = "has no source" if split not in given else f"needs no rows: data.{HELD_OUT[split]} has a source"
            raise DataError(
                f"data.held_out.{split}={share}: data.{split} {problem}; allowed: a split with a source, and "
                f"data.{HELD_OUT[split]}=null."
            )
    return {split: Shares(((HELD_OUT[split], share),), seed) for split, share in shares.items()}
