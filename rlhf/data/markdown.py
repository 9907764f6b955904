"""HTML to Markdown, as a language model is to read and write it."""

from markdownify import markdownify

from rlhf.data.sources import RowError


def to_markdown(html: str) -> str:
    """Markdown without escapes, so that formulas (`$a_1$`) and names (`my_file`) stay as they are; code is fenced.

    Raises:
        RowError: tags nested too deeply to be parsed.
    """
    try:
        text: str = markdownify(html, heading_style="ATX", escape_asterisks=False, escape_underscores=False)
    except RecursionError:
        raise RowError("HTML nested too deeply") from None
    return text.strip()
