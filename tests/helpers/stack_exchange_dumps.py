"""Stack Exchange dumps with made-up posts, and data sets on them."""

from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from rlhf.data.stack_exchange import StackExchange

TEMPLATE = {"with_input": "{instruction}{input}", "without_input": "Question: {instruction}\n\nAnswer: "}

SHARES = {"sft": 0.3, "preference": 0.3, "preference_validation": 0.1, "prompts": 0.2, "eval": 0.1}


def posts_xml(*rows: dict[str, Any]) -> str:
    lines = (
        "  <row " + " ".join(f"{key}={quoteattr(str(value))}" for key, value in row.items()) + " />" for row in rows
    )
    return "\n".join(['\ufeff<?xml version="1.0" encoding="utf-8"?>', "<posts>", *lines, "</posts>"])


def question(id: int, body: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"Id": id, "PostTypeId": 1, "Score": 1, "Body": body or f"<p>Question {id}</p>", **fields}


def answer(id: int, parent: int, votes: int, body: str | None = None) -> dict[str, Any]:
    body = body or f"<p>Answer {id}</p>"
    return {"Id": id, "PostTypeId": 2, "ParentId": parent, "Score": votes, "Body": body}


def write_dump(folder: Path, *rows: dict[str, Any], name: str = "Posts.xml") -> Path:
    (folder / name).write_text(posts_xml(*rows), encoding="utf-8")
    return folder / name


def stack_exchange(root: Path, only: str = "", **options: Any) -> StackExchange:
    """A data set with all questions in the split `only`, or train_and_held_out by `SHARES`."""
    shares = {only: 1} if only else SHARES
    return StackExchange(
        **{"root": str(root), "template": TEMPLATE, "sources": "Posts.xml", "shares": shares} | options
    )
