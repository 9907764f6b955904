"""Stack Exchange as StackLLaMA read it: from a site's dump, or from pairs as in stack-exchange-paired."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from datasets import Dataset, Features, Sequence, Value

from rlhf.data.options import (
    as_list,
    check_sources,
    first_rows,
    parse_max_rows,
    parse_on_bad_row,
    parse_template,
)
from rlhf.data.packing import unpacked_name
from rlhf.data.reading import REASON, code_digest, generated
from rlhf.data.records import RECORDS, Split, columns
from rlhf.data.sources import Source
from rlhf.data.splitting import Shares, expand
from rlhf.data.templates import Template
from rlhf.data.threads import Dump, Pairing, Pairs, Tally, Thread
from rlhf.errors import DataError

log = logging.getLogger(__name__)

TEXT = Value("string")
PLACES = Sequence(Value("int32"))
FEATURES = Features(
    {"id": TEXT, "question": TEXT, "answers": Sequence(TEXT), "better": PLACES, "worse": PLACES, REASON: TEXT}
)
NEEDS: dict[Split, str] = {
    "sft": "an answer",
    "sft_validation": "an answer",
    "preference": "two answers of different scores",
    "preference_validation": "two answers of different scores",
    "eval": "an answer",
}


@dataclass(frozen=True)
class Report:
    """What became of the rows of each source."""

    tallies: Mapping[str, Tally]

    @property
    def counts(self) -> dict[str, int]:
        """Skipped rows by reason, the most frequent first: what a run's summary lists."""
        counts: Counter[str] = Counter()
        for tally in self.tallies.values():
            counts.update(tally.skipped)
        return dict(counts.most_common())

    def lines(self) -> list[str]:
        """A line for each source and reason, with the first row numbers."""
        return [
            f"{name}: {count:,} of {tally.rows:,} rows skipped: {reason} ({_row_numbers(count, tally.first[reason])})"
            for name, tally in self.tallies.items()
            for reason, count in tally.skipped.items()
        ]


def _row_numbers(count: int, first: list[int]) -> str:
    return f"row{'s' * (count > 1)} {', '.join(f'{row:,}' for row in first)}{', …' * (count > len(first))}"


class StackExchange:
    """Questions divided into splits: the best answer is the demonstration and the reference, pairs are comparisons.

    `sources` is a site's `Posts.xml` (maybe as `.gz` or `.zst`) below `root`, pairs (a file or Hub id as in
    `rlhf.data.sources.Source`, with `question`, `response_j` and `response_k`), or a list of these. A dump is streamed
    and joined on disk; that takes about its own size there for the time of the first reading, whose outcome `datasets`
    caches by name, size and time of change.

    An answer's score is `rlhf.data.posts.score`; answers with different scores are pairs, of which at most
    `max_pairs_per_question` are drawn by `seed`. A question belongs to one split, by a hash of its id and `seed`.
    """

    def __init__(
        self,
        *,
        template: Any,
        sources: Any,
        shares: Any,
        root: str = ".",
        max_pairs_per_question: int = 10,
        title: bool = False,
        seed: int = 0,
        on_bad_row: str = "skip",
        max_rows: Any = None,
    ) -> None:
        """Understand the configuration as it comes (hence `Any`); `check` then looks for the files, `load` reads them.

        Raises:
            DataError: a malformed template, source, `shares`, `max_pairs_per_question`, `on_bad_row` or `max_rows`.
        """
        self.template = parse_template(template)
        if type(max_pairs_per_question) is not int or max_pairs_per_question < 1:
            raise DataError(f"max_pairs_per_question is a positive number, not {max_pairs_per_question!r}.")
        self.sources = tuple(_parse(spec, Path(root).expanduser()) for spec in as_list(sources))
        self._shares = Shares.parse(shares, seed)
        self.splits = self._shares.splits
        self.report: dict[Split, Report] = {}
        self._pairing = Pairing(max_pairs_per_question, seed, title)
        self._fail = parse_on_bad_row(on_bad_row) == "fail"
        self._max_rows = parse_max_rows(max_rows)
        self._read: tuple[Dataset, Report] | None = None

    def check(self) -> None:
        """See in an instant whether the files are there, before a model is loaded.

        Raises:
            DataError: no source at all, or one that is missing, empty or of an unknown format.
        """
        if not self.sources:
            raise DataError("data.sources names nothing: a site's Posts.xml, a file of pairs, or a Hub id.")
        check_sources("data.sources", self.sources)

    def load(self, split: Split) -> Dataset:
        """Rows of `split`, with the columns of its record.

        Raises:
            DataError: there is no such split, a source cannot be read, or not a single question fits the split.
        """
        if split not in self.splits:
            raise DataError(f"data.shares gives nothing to {split}: there is {', '.join(self.splits)}.")
        threads, self.report[split] = self._threads()
        records = _ToRecords(split, self.template, self._shares)
        needs = f" that has {NEEDS[split]}" if split in NEEDS else ""
        nothing = f"{split}: its share of the {len(threads):,} questions holds none{needs}."
        rows = expand(threads, records, Features(dict.fromkeys(columns(split), TEXT)), split, nothing)
        return first_rows(rows, split, self._max_rows)

    def _threads(self) -> tuple[Dataset, Report]:
        if self._read is None:
            self.check()
            stamps = (*(source.stamp() for source in self.sources), code_digest())
            rows = generated(_generate, _Job(self.sources, self._pairing, stamps), FEATURES, "threads")
            # the last row is the report, so that it is cached with what it reports on
            report = Report({name: Tally(**tally) for name, tally in json.loads(rows[-1][REASON])})
            for line in report.lines():
                if self._fail:
                    raise DataError(f"{line}; `on_bad_row: skip` skips and counts such rows.")
                log.warning("%s", line)
            for name, t in report.tallies.items():
                log.info("%s: %d rows: %d questions, %d answers, %d pairs; %d are neither question nor answer",
                         name, t.rows, t.questions, t.answers, t.pairs, t.other)  # fmt: skip
            if len(rows) == 1:
                reasons = ", ".join(f"{count:,} × {reason}" for reason, count in report.counts.items())
                raise DataError(
                    f"{', '.join(report.tallies)}: not a single question can be used ({reasons or 'no rows'})."
                )
            self._read = rows.take(len(rows) - 1), report
        return self._read


@dataclass(frozen=True)
class _Job:
    """All that determines the threads: hashed into the cache key."""

    sources: tuple[Dump | Pairs, ...]
    pairing: Pairing
    stamps: tuple[str, ...]


def _parse(spec: Any, root: Path) -> Dump | Pairs:
    if isinstance(spec, str) and unpacked_name(spec).endswith(".xml"):
        return Dump(spec, root / os.path.expanduser(spec))
    return Pairs(Source.parse(spec, root))


def _generate(job: _Job) -> Iterator[dict[str, Any]]:
    """The threads of all sources, then the report."""
    tallies = []
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # a disk meant for large files, which /tmp may not be
    with TemporaryDirectory(dir=cache, prefix="stack_exchange-") as work:
        for source in job.sources:
            tally = Tally()
            tallies.append((source.name, tally))
            for thread in source.threads(tally, job.pairing, Path(work)):
                yield {**asdict(thread), REASON: ""}
    report = json.dumps([(name, asdict(tally)) for name, tally in tallies])
    yield {**asdict(Thread("", "", [], [], [])), REASON: report}


@dataclass(frozen=True)
class _ToRecords:
    """Makes the records that a split has of a thread."""

    split: Split
    template: Template
    shares: Shares

    def __call__(self, thread: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.shares.split_of(thread["id"]) != self.split:
            return
        record = RECORDS[self.split]
        for fields in self._fields(thread["question"], thread):
            yield asdict(record(self.template.render(thread["question"]), **fields))

    def _fields(self, question: str, thread: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        answers = thread["answers"]
        match self.split:
            case "preference" | "preference_validation":
                for better, worse in zip(thread["better"], thread["worse"], strict=True):
                    yield {"chosen": answers[better], "rejected": answers[worse]}
            case "prompts":
                yield {"instruction": question}
            case _ if not answers:
                return
            case "eval":
                yield {"instruction": question, "reference_output": answers[0]}
            case _:
                yield {"response": answers[0]}
