"""Convert HTML to the Markdown that a language model reads and writes."""

import re
from collections.abc import Callable
from typing import Any

from markdownify import MarkdownConverter

from rlhf.errors import RowError


def to_markdown(html: str) -> str:
    """Convert HTML to Markdown.

    Asterisks and underscores are not escaped, so that formulas (`$a_1$`) and names (`my_file`) stay as they are. Code
    blocks are fenced. Superscripts and subscripts, for which Markdown has no syntax, keep their tags: 10<sup>-9</sup>.

    Raises:
        RowError: the tags are nested too deeply to be parsed.
    """
    converter = _Converter(heading_style="ATX", escape_asterisks=False, escape_underscores=False)
    try:
        text: str = converter.convert(html)
    except RecursionError:
        raise RowError("HTML nested too deeply") from None
    return text.strip()


def _keep_tag(tag: str, sign: str) -> Callable[..., str]:
    """A converter that keeps `tag`, but writes `sign` inside code, where a tag would be plain text."""

    def convert(self: Any, element: Any, text: str, parent_tags: set[str]) -> str:
        if not text.strip():
            return text
        return f"{sign}{text}" if {"code", "pre", "kbd", "samp", "tt"} & parent_tags else f"<{tag}>{text}</{tag}>"

    return convert


_Base: Any = MarkdownConverter  # `Any`, because its type stubs lack the methods


class _Converter(_Base):
    """markdownify's converter, changed where it would lose something.

    These are superscripts, subscripts, `<strike>`, `<tt>`, code that contains a fence, and bars in table cells.
    """

    convert_sup = _keep_tag("sup", "^")
    convert_sub = _keep_tag("sub", "_")
    convert_strike = _Base.convert_del
    convert_tt = _Base.convert_code

    def convert_pre(self, element: Any, text: str, parent_tags: set[str]) -> str:
        """Use a fence longer than any run of backticks in the code, which would otherwise end the block."""
        fenced: str = super().convert_pre(element, text, parent_tags)
        longest = max(map(len, re.findall("`{3,}", text)), default=0)
        if not longest:
            return fenced
        fence = "`" * (longest + 1)
        body = fenced.strip("\n").removeprefix("```").removesuffix("```")
        return f"\n\n{fence}{body}{fence}\n\n"

    def convert_td(self, element: Any, text: str, parent_tags: set[str]) -> str:
        """Escape bars in a cell, because a bar starts the next cell."""
        return str(super().convert_td(element, text.replace("|", "\\|"), parent_tags))

    def convert_th(self, element: Any, text: str, parent_tags: set[str]) -> str:
        """Escape bars in a cell of the header row."""
        return str(super().convert_th(element, text.replace("|", "\\|"), parent_tags))
