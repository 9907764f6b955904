"""Scorer contexts on tiny models, for scorers and judges."""

import functools
from pathlib import Path
from typing import Any

from rlhf.data.templates import PromptTemplate
from rlhf.models.roles import Roles
from rlhf.scorers import Context
from tests.helpers.tiny_models import tiny_roles, word_tokenizer


class NoSource:
    """A data set that must not be read; it may have a prompt template."""

    splits = ()

    def __init__(self, template: PromptTemplate | None = None):
        self.template = template

    def load(self, split: str) -> Any:
        raise AssertionError


@functools.cache
def shared_roles() -> Roles:
    return tiny_roles()


def scorer_context(folder: Path) -> Context:
    return Context(NoSource(), word_tokenizer(), shared_roles(), cache=folder)
