"""Stack Exchange questions and answers as in StackLLaMA, from a site's dump or from rows of pairs."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from datasets import Dataset, Features, Sequence, Value

from rlhf.data.caching import REASON, cached_rows, code_digest
from rlhf.data.compression import without_compression
from rlhf.data.options import (
    as_list,
    check_sources,
    first_rows,
    parse_max_rows,
    parse_on_bad_row,
    parse_positive,
    parse_template,
)
from rlhf.data.records import RECORDS, SPLITS, Split, columns
from rlhf.data.reports import reasons_and_counts
from rlhf.data.sources import Source
from rlhf.data.splitting import Shares, expand
from rlhf.data.templates import PromptTemplate
from rlhf.data.thread_sources import Dump, Pairs
from rlhf.data.threads import Pairing, Tally, Thread, ThreadReport
from rlhf.errors import DataError

log = logging.getLogger(__name__)

TEXT = Value("string")
INDICES = Sequence(Value("int32"))
# The columns of a thread. `REASON` is "" except in the last row, where it is the report of all sources.
FEATURES = Features(
    {"id": TEXT, "question": TEXT, "answers": Sequence(TEXT), "better": INDICES, "worse": INDICES, REASON: TEXT}
)
# What a question must have to give a record, for messages.
NEEDS: dict[Split, str] = {
    "sft": "an answer",
    "sft_validation": "an answer",
    "preference": "two answers of different scores",
    "preference_validation": "two answers of different scores",
    "eval": "an answer",
}


class StackExchange:
    """Questions and answers, assigned to splits by a hash of the question's id, so that no question is in two splits.

    The best answer of a question is its demonstration in `sft` and its reference output in `eval`. Two answers with
    different scores (`rlhf.data.posts.answer_score`) are a pair, and pairs are the comparisons of `preference`.

    A dump is read incrementally and grouped by question on disk, which temporarily takes about its own size in the
    cache folder of `datasets`. The result is cached there by the file's name, size, times and inode.
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
        """Check the configuration, whose values may be anything (hence `Any`); no file is read.

        Args:
            template: What `rlhf.data.options.parse_template` accepts. Of two strings, only `without_input` is used.
            sources: A source or a list of sources: a site's `Posts.xml`, `Posts.xml.gz` or `Posts.xml.zst`, or rows of
                pairs (`rlhf.data.sources.Source.parse`) with the fields `question`, `response_j` (the better answer),
                `response_k` and optionally `qid`. Or a mapping from split to its source or sources.
            shares: Mapping from split to its share of the questions (`rlhf.data.splitting.Shares`), for sources that
                are not given by split.
            root: The folder of the files.
            max_pairs_per_question: Most pairs per question; if there are more, some are drawn.
            title: Whether a question's title is put above its text.
            seed: Selects the split of each question and the pairs drawn.
            on_bad_row: `skip` counts and skips bad rows; `fail` raises an error.
            max_rows: Most rows per split: a number, a mapping from split to number, or None. The first rows are taken.

        Raises:
            DataError: a malformed template, source, `shares`, `max_pairs_per_question`, `on_bad_row` or `max_rows`.
        """
        self.template = parse_template(template)
        limit = parse_positive(max_pairs_per_question, "data.max_pairs_per_question")
        by_split = _is_by_split(sources)
        self._sources = {
            split: tuple(_parse_source(spec, Path(root).expanduser()) for spec in as_list(specs))
            for split, specs in (sources.items() if by_split else [(None, sources)])
        }
        # all questions of a split's own sources belong to it
        self._shares = {split: Shares.parse({split: 1} if by_split else shares, seed) for split in self._sources}
        self.splits: tuple[Split, ...] = tuple(sources) if by_split else self._shares[None].splits
        self.report: dict[Split, ThreadReport] = {}
        self._pairing = Pairing(limit, seed, title)
        self._fail_on_bad_row = parse_on_bad_row(on_bad_row) == "fail"
        self._max_rows = parse_max_rows(max_rows)
        self._threads: dict[Split | None, tuple[Dataset, ThreadReport]] = {}

    def check(self) -> None:
        """Check without reading them that the files can be read.

        Raises:
            DataError: there is no source, or one is missing, empty or of an unknown format.
        """
        for split, sources in self._sources.items():
            key = f"data.sources.{split}" if split else "data.sources"
            check_sources(key, sources, "a site's Posts.xml, a file of pairs, or a Hub id")

    def load(self, split: Split) -> Dataset:
        """The rows of `split`; see `DataSource.load`.

        Raises:
            DataError: the split has no share, a source cannot be read, or no question in the share gives a record.
        """
        part = None if None in self._sources else split
        if part not in self._sources:
            raise DataError(f"data.sources has no source for {split}; allowed: {', '.join(self.splits)}.")
        shares = self._shares[part]
        shares.require(split)
        if part not in self._threads:
            self._threads[part] = self._read_threads(self._sources[part])
        threads, self.report[split] = self._threads[part]
        to_records = _ToRecords(split, self.template, shares)
        needs = f" and has {NEEDS[split]}" if split in NEEDS else ""
        if_empty = f"{split}: none of the {len(threads):,} questions falls into its share{needs}."
        rows = expand(threads, to_records, Features(dict.fromkeys(columns(split), TEXT)), split, if_empty)
        return first_rows(rows, split, self._max_rows)

    def _read_threads(self, sources: tuple[Dump | Pairs, ...]) -> tuple[Dataset, ThreadReport]:
        """The threads of some sources, from the cache if they are there, and the report, which is logged."""
        self.check()
        # 1. Read the threads. The last row is the report, so that it is cached with the rows that it reports on.
        fingerprints = (*(source.fingerprint() for source in sources), code_digest())
        rows = cached_rows(_generate_threads, _Job(sources, self._pairing, fingerprints), FEATURES, "threads")
        report = ThreadReport({name: Tally(**tally) for name, tally in json.loads(rows[-1][REASON])})
        # 2. Log what was skipped and what was kept.
        for line in report.lines():
            if self._fail_on_bad_row:
                raise DataError(f"{line}; data.on_bad_row=skip skips and counts such rows.")
            log.warning("%s", line)
        for name, t in report.tallies.items():
            log.info("%s: %d rows: %d questions, %d answers, %d pairs; %d are neither question nor answer",
                     name, t.rows, t.questions, t.answers, t.pairs, t.other)  # fmt: skip
        # 3. Remove the row with the report.
        if len(rows) == 1:
            reasons = reasons_and_counts(report.counts) or "no rows"
            raise DataError(f"{', '.join(report.tallies)}: no question can be used ({reasons}).")
        return rows.take(len(rows) - 1), report


@dataclass(frozen=True)
class _Job:
    """Everything that determines the threads; its pickle is the cache key."""

    sources: tuple[Dump | Pairs, ...]
    pairing: Pairing
    fingerprints: tuple[str, ...]


def _is_by_split(sources: Any) -> bool:
    """Whether `sources` maps splits to sources; any other mapping is a single source on the Hub."""
    return isinstance(sources, Mapping) and bool(sources) and set(sources) <= set(SPLITS)


def _parse_source(spec: Any, root: Path) -> Dump | Pairs:
    if isinstance(spec, str) and without_compression(spec).endswith(".xml"):
        return Dump(spec, root / os.path.expanduser(spec))
    return Pairs(Source.parse(spec, root))


def _generate_threads(job: _Job) -> Iterator[dict[str, Any]]:
    """Yield the threads of all sources, then one row with the report as JSON in `REASON`."""
    tallies = []
    cache = Path(datasets.config.HF_DATASETS_CACHE)  # has room for large files, which the system's /tmp may not have
    with TemporaryDirectory(dir=cache, prefix="stack_exchange-") as folder:
        for source in job.sources:
            tally = Tally()
            tallies.append((source.name, tally))
            for thread in source.threads(tally, job.pairing, Path(folder)):
                yield {**asdict(thread), REASON: ""}
    report = json.dumps([(name, asdict(tally)) for name, tally in tallies])
    yield {**asdict(Thread("", "", [], [], [])), REASON: report}


@dataclass(frozen=True)
class _ToRecords:
    """Makes the records of a thread, if its question is in `split`: one per pair in `preference`, else at most one."""

    split: Split
    template: PromptTemplate
    shares: Shares

    def __call__(self, thread: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.shares.split_of(thread["id"]) != self.split:
            return
        record = RECORDS[self.split]
        for fields in self._fields(thread["question"], thread):
            yield asdict(record(self.template.render(thread["question"]), **fields))

    def _fields(self, question: str, thread: Mapping[str, Any]) -> Iterator[dict[str, str]]:
        """Yield the fields of each record except `prompt`."""
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
