"""Prompt templates: what they render, and which are refused."""

import pytest

from rlhf.data.templates import Template
from rlhf.errors import DataError

GOOD = {"with_input": "{instruction} {input}", "without_input": "{instruction}"}


def test_template_renders_braces_of_rows_and_of_its_own():
    template = Template(with_input="{{{instruction}}} {input}", without_input="{instruction}:")
    assert template.render("{input}", "{x}") == "{{input}} {x}"
    assert template.render("a {b}") == "a {b}:"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("without_input", "Say:", "must use exactly {instruction}; it has no placeholder"),
        ("with_input", "{instruction}", "must use exactly {instruction} and {input}; it has {instruction}"),
        ("without_input", "{instruction}{input}", "must use exactly {instruction}; it has {input}, {instruction}."),
        ("without_input", "{instruction}{context}", "must use exactly {instruction}; it has {context}, {instruction}."),
        ("without_input", "{instruction!r}", "must use exactly {instruction}; it has {instruction!r}."),
        ("without_input", "{instruction:>9}", "must use exactly {instruction}; it has {instruction:>9}."),
        ("without_input", "{}", "must use exactly {instruction}; it has {}."),
        ("without_input", "{instruction", "is not a Python format string: "),
    ],
)
def test_malformed_template_is_refused(name, text, complaint):
    with pytest.raises(DataError) as failure:
        Template(**(GOOD | {name: text}))
    assert str(failure.value).startswith(f"data.template.{name} {complaint}")
