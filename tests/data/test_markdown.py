"""HTML to Markdown: elements whose meaning must not be lost."""

import pytest

from rlhf.data.markdown import to_markdown

KEPT = {
    "10<sup>-9</sup>": "10<sup>-9</sup>",
    "$(5/8)$<sup>$n$</sup>": "$(5/8)$<sup>$n$</sup>",
    "CO<sub>2</sub>, x<sup><i>n</i>+1</sup>": "CO<sub>2</sub>, x<sup>*n*+1</sup>",
    "a<sup></sup>b": "ab",
    "<code>2<sup>10</sup></code>": "`2^10`",
    "<pre><code>x<sub>i</sub></code></pre>": "```\nx_i\n```",
    "<strike>old</strike> <s>s</s> <del>d</del>": "~~old~~ ~~s~~ ~~d~~",
    "<tt>m</tt> <kbd>Ctrl</kbd> <samp>out</samp>": "`m` `Ctrl` `out`",
    "<code>a`b</code>": "`` a`b ``",
    "<pre><code>a\n```\nb\n```\n</code></pre>": "````\na\n```\nb\n```\n````",
    "<pre><code>`````</code></pre>": "``````\n`````\n``````",
    "<blockquote><pre><code>```</code></pre></blockquote>": "> ````\n> ```\n> ````",
    "<ul><li>a<ul><li>b</li></ul></li></ul>": "* a\n  + b",
    "<ol start='3'><li>a</li></ol>": "3. a",
    "<table><tr><th>a</th><th>b|c</th></tr><tr><td>1</td><td><code>2|3</code></td></tr></table>": (
        "| a | b\\|c |\n| --- | --- |\n| 1 | `2\\|3` |"
    ),
    "<img src='u.png' alt='a cat'> <a href='/x'>y</a>": "![a cat](u.png) [y](/x)",
    "1 &lt; 2 &amp;&amp; &lt;b&gt;": "1 < 2 && <b>",
}


@pytest.mark.parametrize(("html", "markdown"), KEPT.items())
def test_html_keeps_its_meaning(html: str, markdown: str) -> None:
    assert to_markdown(html) == markdown


def test_markdown_keeps_code_and_formulas():
    html = (
        "<p>Let <em>$a_1 * b_2$</em> &lt; <code>x_y</code>:</p>\n<pre class='lang-c'><code>    int *p;\n\n"
        "if (a &lt; b &amp;&amp; c) {\n\treturn 1;\n}\n</code></pre>\n<ul><li>one</li></ul>"
        "<p><a href='http://a.b/c_d'>link</a><br>end</p>"
    )
    assert to_markdown(html) == (
        "Let *$a_1 * b_2$* < `x_y`:\n\n```\n    int *p;\n\nif (a < b && c) {\n\treturn 1;\n}\n```\n\n* one\n\n"
        "[link](http://a.b/c_d)  \nend"
    )
