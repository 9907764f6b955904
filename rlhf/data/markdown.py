"""HTML to Markdown, as a language model is to read and write it."""

import re
from collections.abc import Callable
from typing import Any

from markdownify import MarkdownConverter

from rlhf.errors import RowError


def to_markdown(html: str) -> str:
    """Markdown without escapes, so that formulas (`$a_1$`) and names (`my_file`) stay as they are; code is fenced.

    Superscripts and subscripts, for which Markdown has no sign, keep their tags: 10<sup>-9</sup>.

    Raises:
        RowError: tags nested too deeply to be parsed.
    """
    converter = _Converter(heading_style="ATX", escape_asterisks=False, escape_underscores=False)
    try:
        text: str = converter.convert(html)
    except RecursionError:
        raise RowError("HTML nested too deeply") from None
    return text.strip()


def _script(tag: str, sign: str) -> Callable[..., str]:
    """A superscript or subscript: tags, but in code, where tags would be read as text, the `sign` of programs."""

    def convert(self: Any, element: Any, text: str, parent_tags: set[str]) -> str:
        if not text.strip():
            return text
        return f"{sign}{text}" if {"code", "pre", "kbd", "samp", "tt"} & parent_tags else f"<{tag}>{text}</{tag}>"

    return convert


_Base: Any = MarkdownConverter  # its stubs leave the methods out


class _Converter(_Base):
    """markdownify, where it loses nothing."""

    convert_sup = _script("sup", "^")
    convert_sub = _script("sub", "_")
    convert_strike = _Base.convert_del
    convert_tt = _Base.convert_code

    def convert_pre(self, element: Any, text: str, parent_tags: set[str]) -> str:
        """A fence longer than any in the code."""
        fenced: str = super().convert_pre(element, text, parent_tags)
        longest = max(map(len, re.findall("`{3,}", text)), default=0)
        if not longest:
            return fenced
        fence = "`" * (longest + 1)
        body = fenced.strip("\n").removeprefix("```").removesuffix("```")
        return f"\n\n{fence}{body}{fence}\n\n"

    def convert_td(self, element: Any, text: str, parent_tags: set[str]) -> str:
        """A cell's own bar is escaped, as it would begin another cell."""
        return str(super().convert_td(element, text.replace("|", "\\|"), parent_tags))

    def convert_th(self, element: Any, text: str, parent_tags: set[str]) -> str:
        """The same for the first row."""
        return str(super().convert_th(element, text.replace("|", "\\|"), parent_tags))
