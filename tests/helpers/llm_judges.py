"""Pools of LLM judges at a local endpoint, and a scripted judge that prefers good answers."""

import re
from pathlib import Path
from typing import Any

from rlhf.data.records import Prompt
from rlhf.evaluation.llm_pool import LLMPool
from tests.helpers.openai_server import Server, text_of
from tests.helpers.scorer_context import scorer_context

PROMPTS = [Prompt(f"Q {i}\n", f"reference {i}", f"Question {i}?") for i in range(40)]

GOOD_ANSWERS = [f"good answer {i}" for i in range(40)]

PARTS = re.compile(r"Answer 1:\n(.*?)\n\nAnswer 2:\n(.*?)\n\nWhich", re.DOTALL)


def shown_outputs(request: dict[str, Any]) -> tuple[str, str]:
    """The two outputs in a request, in the order in which the judge saw them."""
    found = PARTS.search(text_of(request))
    assert found is not None
    return found[1], found[2]


def prefers_good(request: dict[str, Any], number: int = 0) -> str:
    first, second = shown_outputs(request)
    return "Verdict: 2" if first.startswith("bad") or second.startswith("good") else "Verdict: 1"


def make_llm_pool(server: Server | None, folder: Path, **keys: Any) -> LLMPool:
    client = {"api_key_env": None, "timeout": 5.0, "retries": 2, **keys.pop("client", {})}
    if server is not None:
        client["base_url"] = server.url
    keys = {"model": "some", "pool": {"one": {"prompt": "compare"}}, "sampling": {"temperature": 0.0}, **keys}
    return LLMPool(scorer_context(folder), client=client, **keys)
