"""FActScore's knowledge source: the pages of entities, and the passages relevant to a fact."""

import json
import sqlite3
from pathlib import Path

import pytest

from rlhf.errors import DataError
from rlhf.evaluation.knowledge import SEPARATOR, Knowledge, read_entities, split_passages, split_sentences
from tests.helpers.entity_pages import PAGES


def test_pages_from_jsonl_and_from_sqlite_as_factscore_publishes_it(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Ada Lind\n\nBen Ruiz\n")
    entities = read_entities(tmp_path / "names.txt")
    assert [entity.name for entity in entities] == ["Ada Lind", "Ben Ruiz"]
    lines = [{"title": name, "text": [page, "More."]} for name, page in PAGES.items()]
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with sqlite3.connect(tmp_path / "pages.db") as connection:
        connection.execute("CREATE TABLE documents (title PRIMARY KEY, text)")
        rows = [(name, f"<s>{page}</s>{SEPARATOR}<s>More.</s>") for name, page in PAGES.items()]
        connection.executemany("INSERT INTO documents VALUES (?, ?)", rows)
    for name in ("pages.jsonl", "pages.db"):
        knowledge = Knowledge(entities, tmp_path / name, 3)
        assert knowledge.passages("Ada Lind", "Ada Lind was born", 1)[0].startswith("Ada Lind was born in Oslo.")
        assert "More." in knowledge.passages("Ben Ruiz", "more", 9)
    with pytest.raises(DataError, match=r"names.txt.* has no page for 1 of 1 entities, such as 'Nobody'|no page"):
        Knowledge([type(entities[0])("Nobody")], tmp_path / "pages.db", 9)
    with pytest.raises(DataError, match="does not exist"):
        Knowledge(entities, tmp_path / "no.db", 9)
    (tmp_path / "text.db").write_text("no database")
    with pytest.raises(DataError, match=r"is not an SQLite database with a table documents\(title, text\)"):
        Knowledge(entities, tmp_path / "text.db", 9)


def test_the_passages_that_bear_on_a_fact_come_first(tmp_path: Path) -> None:
    filler = [f"In {1900 + i} there was a meeting about matter number {i}." for i in range(40)]
    page = " ".join([*filler[:20], "The violinist Iva Bek owned a red bicycle.", *filler[20:]])
    (tmp_path / "one.jsonl").write_text(json.dumps({"name": "Iva Bek", "text": page}))
    knowledge = Knowledge(read_entities(tmp_path / "one.jsonl"), None, 30)
    found = knowledge.passages("Iva Bek", "Iva Bek had a bicycle that was red.", 2)
    assert len(found) == 2
    assert "red bicycle" in found[0]
    assert len(knowledge.passages("Iva Bek", "zzz", 5)) == 5


def test_passages_are_whole_sentences_and_none_is_lost() -> None:
    page = "Dr. Ann Lee lives in the U.S. with a cat. She sings.\nShe is 40. " + "word " * 30 + "end."
    passages = split_passages(page, 12)
    assert " ".join(passages).split() == page.split()
    assert passages[0] == "Dr. Ann Lee lives in the U.S. with a cat. She sings."
    assert max(len(passage.split()) for passage in passages) == 31
    assert split_sentences("  \n") == []
