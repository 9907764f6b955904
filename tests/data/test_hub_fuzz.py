"""Arbitrary rows and maps of columns of data=hub: a row gives records or one reason, and nothing else is raised."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.data.column_maps import ALLOWED, FIELDS, FORMATS, MappedSource, Row, parse_columns
from rlhf.data.records import RECORDS, SPLITS, ScoredComparison, Split
from rlhf.data.sources import Source
from rlhf.errors import DataError, RowError
from tests.helpers.hub_rows import hub

texts = st.sampled_from(["", " ", "a b", "a c", "Human: a\n\nAssistant: b", "Human:", "\ud800", "1", "2"])
leaves = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | texts
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "a\nb"]) | leaves, "content": texts | leaves}
)
values = st.recursive(leaves | st.lists(messages | leaves, max_size=3), lambda inner: st.lists(inner, max_size=3))
sides = st.lists(messages, min_size=1, max_size=3) | texts


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), verbatim=st.booleans(), marked=st.booleans(), kept=st.booleans())
def test_any_row_gives_records_or_one_reason(data: st.DataObject, verbatim: bool, marked: bool, kept: bool) -> None:
    options: dict[str, Any] = {"verbatim": verbatim, "tool_turns": "text" if kept else "refuse", "ties": "random"}
    options |= {"turn_markers": {"user": "Human:", "assistant": "\n\nAssistant:"}} if marked else {}
    split: Split = data.draw(st.sampled_from(SPLITS))
    format = data.draw(st.sampled_from(ALLOWED[split]))
    names = data.draw(st.sets(st.sampled_from(sum(FORMATS[format], ())))) | set(FORMATS[format][0])
    row = Row(
        {name: data.draw(values | sides) for name in sorted(names)},
        dict.fromkeys(names) | {n: n for n in names},
        format,
    )
    to_records = hub(Path(), **options, **{split: "x.jsonl"})._to_record(split, set())
    try:
        records = to_records(row)
    except RowError as bad:
        said, records = str(bad), []
    else:
        said = "good"
    assert said
    assert "\n" not in said
    assert records or said != "good"
    for record in records:
        assert isinstance(record, RECORDS[split])
        if isinstance(record, ScoredComparison):
            assert record.chosen != record.rejected


@settings(max_examples=200, deadline=None)
@given(
    found=st.lists(st.sampled_from([name for names in FIELDS.values() for name in names]), unique=True, min_size=1),
    columns=st.dictionaries(st.sampled_from(list(FIELDS)), st.none() | st.sampled_from(["prompt", "x", "text"])),
)
def test_any_columns_make_a_format_or_are_refused(found: list[str], columns: dict[str, str | None]) -> None:
    for split in SPLITS:
        source = MappedSource(Source("x.jsonl", Path("x.jsonl")), parse_columns(columns), ALLOWED[split])
        try:
            format, names = source._recognise(found)
        except DataError:
            continue
        assert set(FORMATS[format][0]) <= names.keys() <= {*FORMATS[format][0], *FORMATS[format][1]}
        assert set(names.values()) <= set(found)
