"""Arbitrary files and values: rows are kept or counted, errors are one sentence, and nothing else is ever raised."""

import copy
import gzip
import json
import os
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from rlhf.data.records import columns
from rlhf.errors import DataError
from rlhf.errors.explaining import explain
from rlhf.pipeline.checks import check
from rlhf.pipeline.config import data_source, settings_of
from tests.helpers.composed_config import composed
from tests.helpers.data_readers import FILES, GOOD, PAIR, SPLIT, alpaca, dump, imdb, pairs, preference

MORE = int(os.environ.get("RLHF_FUZZ", "1"))  # multiplies the number of examples
FUZZ = settings(max_examples=30 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
SUFFIXES = ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "xml", "xml.gz"]
READERS = [alpaca, preference, imdb, pairs]

texts = st.sampled_from(["", " ", "a b", "1", "\ud800", "\0", "{x}", "é\u2028"]) | st.text(max_size=8)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=4
)
names = st.sampled_from([*GOOD, *PAIR, "qid", "input"])
rows = st.dictionaries(names, texts | values, max_size=8) | st.fixed_dictionaries(
    dict.fromkeys({**GOOD, **PAIR}, texts)
)


def read(reader: Callable, name: str, content: bytes) -> tuple[list[dict[str, str]], Any]:
    """Read a file: (records, report), or ([], error message) if it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        try:
            source = reader(Path(folder), name)
            source.check()
            return source.load(SPLIT[reader]).to_list(), source.report[SPLIT[reader]]
        except DataError as refused:
            sentence = str(refused)
    assert "\n" not in sentence
    return [], sentence


@FUZZ
@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=200), start=st.sampled_from(FILES))
def test_any_bytes_are_read_or_refused(suffix: str, content: bytes, start: tuple) -> None:
    reader = dump if "xml" in suffix else alpaca
    for damaged in (
        content,
        start[2] + content,
        content + start[2],
        start[2][: len(content)] + start[2][len(content) + 1 :],
    ):
        read(reader, f"x.{suffix}", damaged)
        if suffix.endswith(".gz"):
            read(reader, f"x.{suffix}", gzip.compress(damaged))


def as_jsonl(some: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in some)


@FUZZ
@given(reader=st.sampled_from(READERS), some=st.lists(rows | values, max_size=8), listed=st.booleans())
def test_every_json_row_is_kept_or_counted(reader: Callable, some: list[Any], listed: bool) -> None:
    some = [*some, PAIR if reader is pairs else GOOD]  # one good row, so that a report exists
    name, content = ("x.json", json.dumps(some).encode()) if listed else ("x.jsonl", as_jsonl(some))
    records, report = read(reader, name, content)
    assert not isinstance(report, str), report
    skipped = sum(report.counts.values())
    if reader is pairs:
        assert report.tallies[name].rows == len(some)
        assert report.tallies[name].pairs == len(records) <= len(some) - skipped
    else:
        assert report.read == {name: len(some)}
        assert len(records) + skipped == len(some)
    for record in records:
        assert list(record) == columns(SPLIT[reader])
        assert all(isinstance(field, str) for field in record.values())


safe = st.text(st.characters(blacklist_categories=["Cs"]), max_size=6)


@FUZZ
@given(some=st.lists(st.tuples(safe, safe) | st.lists(safe, max_size=4).map(tuple), max_size=8))
def test_every_csv_row_is_kept_or_counted(some: list[tuple[str, ...]]) -> None:
    quoted = [",".join('"' + field.replace('"', '""') + '"' for field in row) for row in some]
    records, report = read(alpaca, "x.csv", "\n".join(["instruction,output", "Do,Done.", *quoted]).encode())
    assert not isinstance(report, str), report
    blank = sum(not row for row in some)
    assert report.read == {"x.csv": 1 + len(some) - blank}
    assert len(records) + sum(report.counts.values()) == 1 + len(some) - blank


columns_of = st.sampled_from([st.text(max_size=5), st.integers(-9, 9), st.booleans(), st.binary(max_size=3)])


@settings(FUZZ, max_examples=15 * MORE)
@given(data=st.data(), count=st.integers(1, 5))
def test_every_parquet_row_is_kept_or_counted(data: st.DataObject, count: int) -> None:
    table = {
        name: data.draw(st.lists(st.none() | data.draw(columns_of), min_size=count, max_size=count))
        for name in ("instruction", "output")
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    records, report = read(alpaca, "x.parquet", sink.getvalue().to_pybytes())
    if not isinstance(report, str):
        assert len(records) + sum(report.counts.values()) == count


attributes = st.dictionaries(
    st.sampled_from(["Id", "PostTypeId", "ParentId", "Score", "Body", "Title", "AcceptedAnswerId"]),
    st.sampled_from(["", "1", "2", "3", "-1", "x", "9" * 30, "&lt;p&gt;Hi&lt;/p&gt;", "&lt;![", "&#10;"]),
)


@FUZZ
@given(some=st.lists(attributes, max_size=8))
def test_every_post_is_a_question_an_answer_another_or_counted(some: list[dict[str, str]]) -> None:
    written = [" ".join(f'{name}="{value}"' for name, value in row.items()) for row in some]
    posts = "".join(f"<row {row}/>" for row in written)
    first = '<row Id="77" PostTypeId="1" Score="1" Body="Why?"/>'
    _, report = read(dump, "x.xml", f"<posts>{first}{posts}</posts>".encode())
    assert not isinstance(report, str), report
    tally = report.tallies["x.xml"]
    assert tally.rows == 1 + len(some) == tally.questions + tally.answers + tally.other + sum(report.counts.values())


def leaf_keys(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for name in node:
        child = node._get_node(name)
        inner = isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation()
        found += [f"{prefix}{name}", *(leaf_keys(child, f"{prefix}{name}.") if inner else [])]
    return found


def unlocked(*overrides: str) -> DictConfig:
    """A composed configuration to which any key can be added."""
    config = composed(*overrides)
    OmegaConf.set_struct(config, False)
    return config


CONFIGS = [
    unlocked(),
    unlocked("data=alpaca", "judge=none", "kl=adaptive", "data.root=/nope"),
    unlocked("data=stack_exchange", "judge=none", "scorer=sentiment", "data.root=/nope"),
    unlocked("data=imdb", "judge=none", "scorer=gold"),
    unlocked("data=hub", "judge=none", "data.root=/nope", "data.sft=x.jsonl", "data.prompts=x.jsonl"),
]
# left out: sizes of the simulated world and of models built from scratch, where huge values take hours and do not fail
KEYS = [
    [key for key in leaf_keys(config) if not key.startswith(("data.people", "model.config.num_hidden", "data._t"))]
    for config in CONFIGS
]
words = st.text(string.printable, max_size=5)
odd = st.sampled_from(["???", "${nope}", "${name}", "${", "null", "os.system", "a.b.c", "../..", "\0", "x" * 300])
numbers = st.sampled_from([-1, 0, 0.5, 2, 10**12, -(10**12), 1e-320, float("inf"), float("nan")])
inner_values = st.none() | st.booleans() | numbers | words | odd
any_value = inner_values | st.lists(inner_values, max_size=2) | st.dictionaries(words, inner_values, max_size=2)


@settings(FUZZ, max_examples=60 * MORE)
@given(data=st.data(), value=any_value, which=st.integers(0, len(CONFIGS) - 1))
def test_any_value_of_any_key_is_accepted_or_refused_in_one_sentence(
    data: st.DataObject, value: Any, which: int
) -> None:
    key = data.draw(st.sampled_from(KEYS[which]))
    config = copy.deepcopy(CONFIGS[which])
    try:
        OmegaConf.update(config, key, value, merge=False)
        chosen = settings_of(config)
        check(config, chosen, data_source(config))
    except Exception as error:
        said = explain(error)
        if said is None:
            raise
        assert said.strip()
        assert "\n" not in said.replace(str(value), ""), said
