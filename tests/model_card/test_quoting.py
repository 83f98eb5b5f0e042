"""The source's text is quoted by what a Markdown parser sees: deeper headings, absolute addresses, nothing else."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from model_card.quoting import quote

BASE = "https://hub.example/org/m/{kind}/c0ffee"
RESOLVED, BLOB = "https://hub.example/org/m/resolve/c0ffee", "https://hub.example/org/m/blob/c0ffee"


@pytest.mark.parametrize(
    "text",
    [
        "```md\n# no heading\n[n](t.md)\n```",
        "~~~\n# no heading\n```\n~~~",
        "    # indented code\n    [n](t.md)",
        "- item\n\n      # code in a list\n\n  ```\n  [a](b.md)\n  ```",
        "> ```\n> # quoted code\n> [a](b.md)\n> ```",
        "`[not](touched.md)` and ``a ` [b](c.md)``, and a `code\nspan [a](b.md)`",
        '<!-- # no heading [a](b.md) <img src="x.png"> -->',
        "<!--\n\n# no heading\n\n<h1>x</h1>\n-->",
        "<pre>\n# no heading\n\n[a](b.md)\n</pre>",
        "<script>\nlet a = '<img src=\"x.png\">';\n</script>",
        "$$\na\n=\nb [c](d.md)\n$$",
        "text $$ [a](b.md) $$ text, and \\\\( [a](b.md) \\\\)",
        "\\\\[\na\n---\nb\n\\\\]",
        '\\[a\\](b.md) and &lt;img src="x.png"&gt;',
        "a\u2028# is no line end\x0bhere\x85",
        "[a](https://x.example/y) [b](#top) [c](mailto:a@b.c) [d](//host/x) ![e](data:image/png;base64,AA) [f]()",
        "<https://x.example/y> and www.example.org/x.md",
        "[^1]: word",
        "| a | b |\n|---|---|\n| `x \\| [y](z.md)` | 1 |",
        "***\n\n- - -\n\n___",
        "<a href='https://x.example/#y'>z</a>",
        "",
    ],
)
def test_code_formulas_comments_and_absolute_addresses_stay(text: str) -> None:
    assert quote(text, BASE) == text


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("# One\n## Two ##\n###### Six", "### One\n#### Two ##\n###### Six"),
        ("Title\n=====\n\nPart\n---", "### Title\n\n#### Part"),
        ("two\nlines\n===", "### two lines"),
        ("C #\n===", "### C \\#"),
        ("a\\\nb  \nc\\\\\nd\n===", "### a<br>b<br>c\\\\ d"),
        ("> Quoted\n> ======\n> text", "> ### Quoted\n> text"),
        ("- Item\n  ---\n- # Other", "- #### Item\n- ### Other"),
        ("a\nb\n\n---\n\n- item\n---", "a\nb\n\n---\n\n- item\n---"),
        ("[A *b*](c.md)\n===", f"### [A *b*]({BLOB}/c.md)"),
        ("#\ttab", "###\ttab"),
        ("<h1 id='x'>Old</h1>", "<h3 id='x'>Old</h3>"),
        ("text <H2>x</H2>", "text <H4>x</H4>"),
        ("# a\r\n\r\nb\rc", "### a\n\nb\nc"),
    ],
)
def test_headings(text: str, quoted: str) -> None:
    assert quote(text, BASE) == quoted


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("[a](b.md)", f"[a]({BLOB}/b.md)"),
        ('[a](./b.md#c "t")', f'[a]({BLOB}/b.md#c "t")'),
        ("![a](b.PNG?raw=true)", f"![a]({RESOLVED}/b.PNG?raw=true)"),
        ("[a](b.png)", f"[a]({RESOLVED}/b.png)"),
        ("[![a](b.svg)](c.md)", f"[![a]({RESOLVED}/b.svg)]({BLOB}/c.md)"),
        ("[a](<b c.md>)", f"[a](<{BLOB}/b c.md>)"),
        ("[a](b_(c).md)", f"[a]({BLOB}/b_(c).md)"),
        ("[a](\n  b.md\n)", f"[a](\n  {BLOB}/b.md\n)"),
        ("[x [y] z](b.md)", f"[x [y] z]({BLOB}/b.md)"),
        ("[`]`](b.md)", f"[`]`]({BLOB}/b.md)"),
        ("[a](/docs/x)", "[a](https://hub.example/docs/x)"),
        ("![a](/org/m/resolve/main/x.png)", "![a](https://hub.example/org/m/resolve/main/x.png)"),
        ("[a][n]\n\n[n]: b.md", f"[a][n]\n\n[n]: {BLOB}/b.md"),
        ("> [n]:\n>   <b.md>\n>   'title'\n>\n> [n]", f"> [n]:\n>   <{BLOB}/b.md>\n>   'title'\n>\n> [n]"),
        ("[^1]: see [a](b.md)", f"[^1]: see [a]({BLOB}/b.md)"),
        ("- one\n  - two [a](b.md)\n\t- [c](d.md)", f"- one\n  - two [a]({BLOB}/b.md)\n\t- [c]({BLOB}/d.md)"),
        ("1. > - [a](b.md)\nlazy [c](d.md)", f"1. > - [a]({BLOB}/b.md)\nlazy [c]({BLOB}/d.md)"),
        ("**[a](b.md)**  \n_![c](d.png)_", f"**[a]({BLOB}/b.md)**  \n_![c]({RESOLVED}/d.png)_"),
        (
            "| a \\| b | [a](b.md) |\n|---|---|\n| [x \\| y](c.md) | <img src=d.png> |",
            f'| a \\| b | [a]({BLOB}/b.md) |\n|---|---|\n| [x \\| y]({BLOB}/c.md) | <img src="{RESOLVED}/d.png"> |',
        ),
        ('<img src="b.png">', f'<img src="{RESOLVED}/b.png">'),
        ("<img alt=x src=b.png>", f'<img alt=x src="{RESOLVED}/b.png">'),
        ("a <IMG SRC='b.png'/> b", f"a <IMG SRC='{RESOLVED}/b.png'/> b"),
        (
            "<img src='b.png'\n  srcset='b.png 1x,\n c.png 2x'>",
            f"<img src='{RESOLVED}/b.png'\n  srcset='b.png 1x,\n c.png 2x'>",
        ),
        ('<img srcset="b.png 1x, /c.png 2x">', f'<img srcset="{RESOLVED}/b.png 1x, https://hub.example/c.png 2x">'),
        (
            '<video poster="p.jpg" src="v.mp4"></video>',
            f'<video poster="{RESOLVED}/p.jpg" src="{RESOLVED}/v.mp4"></video>',
        ),
        ('<a href="docs/">d</a>', f'<a href="{BLOB}/docs/">d</a>'),
        ("<a href=/x>d</a>", '<a href="https://hub.example/x">d</a>'),
        ("<a title='src=\"x.png\"'>d</a>", "<a title='src=\"x.png\"'>d</a>"),
        ('<a href="x?a=1&amp;b=2">d</a>', f'<a href="{BLOB}/x?a=1&amp;b=2">d</a>'),
        ("> <div>\n> <img src=b.png>\n> </div>", f'> <div>\n> <img src="{RESOLVED}/b.png">\n> </div>'),
        ("[a](//[)", "[a](//[)"),
        ("```\ncode", "```\ncode\n```"),
        ("~~~~ md\n~~~", "~~~~ md\n~~~\n~~~~"),
    ],
)
def test_addresses(text: str, quoted: str) -> None:
    assert quote(text, BASE) == quoted


PIECES = [
    *("# One", "Two\n===", "three\nlines\n---", "## Four ##", "C #\n===", "text *a* `b`", "    code", "```\n# a\n```"),
    *(
        "> quoted",
        "> # deep\n> text",
        "- item",
        "- # in item\n  text",
        "1. one\n   ===",
        "***",
        "<h1>x</h1>",
        "<!-- # x -->",
    ),
    *(
        "$$\na\n=\n$$",
        "| a | b |\n|---|---|\n| 1 | `\\|` |",
        "[n]: x.md",
        "[n] [a](b.md) ![c](d.png)",
        "\ttab",
        "[^1]: x",
    ),
    *("~~~\nunclosed", "$$ a", "<div>", "</div>", "\\", "---", "===", ">", "- ", "x\u2028# y", "a\\\nb\n==="),
]


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(["\n", "\n\n"])), max_size=8))
@settings(max_examples=150, deadline=None)
def test_a_quoted_text_reads_as_before_but_for_the_levels(parts: list[tuple[str, str]]) -> None:
    text = "".join(piece + end for piece, end in parts).strip("\n")
    before, after = read(text, demote_by=2), read(quote(text, None), demote_by=0)
    assert before == after


def read(text: str, demote_by: int) -> list[tuple[str, str]]:
    """Kinds and contents of a text's blocks, its headings deeper and each on one line."""
    from model_card.markdown import parser

    blocks = []
    for token in parser().parse(text):
        content = token.content.rstrip("\n")
        if token.type == "html_block":
            content = re.sub(r"(</?h)(\d)", lambda match: match[1] + str(min(6, int(match[2]) + demote_by)), content)
        elif token.type == "inline":
            content = " ".join(
                " ".join(
                    child.content.strip("<>") or ("br" if child.type == "hardbreak" else "")
                    for child in token.children or ()
                ).split()
            )
        tag = f"h{min(6, int(token.tag[1]) + demote_by)}" if token.type.startswith("heading") else token.tag
        blocks.append((f"{token.type} {tag}", content))
    return blocks


def test_upstream_text_is_never_a_template() -> None:
    body = "{{ 7 * 7 }} {% raw %} {# gone? #}"
    assert quote(body, None) == body


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        "# Title\n\nSome [link](a/b.md) and `code` and ![image](c.png) with words around it, again and again.\n\n",
        *("[", "`", "![", "<a ", "<!--", "$$ ", "\\\\( ", "> ", "[a](", "| a ", "<a b='", "* _ ", "$$\n", "a\n===\n"),
    ],
)
def test_a_long_card_is_quick(unit: str) -> None:
    """Twice as much takes not much more than twice as long, where a square would take four times."""
    body = unit * (30_000 // len(unit))
    half, whole = (min(seconds_to_quote(part) for _ in range(2)) for part in (body[: len(body) // 2], body))
    assert whole < 3 * max(half, 0.2)


def seconds_to_quote(body: str) -> float:
    """Processor time, of which the best of some tries tells least about the neighbours."""
    begun = time.process_time()
    quote(body, BASE)
    return time.process_time() - begun


def test_the_parser_agrees_with_commonmark() -> None:
    """The rules that remember positions change nothing else."""
    from model_card.markdown import parser

    text = "\n\n".join(piece for piece in PIECES if "$$" not in piece and "[^" not in piece)
    plain = MarkdownIt("commonmark", {"html": True, "inline_definitions": True}).enable(["table", "strikethrough"])
    assert parser().render(text) == plain.render(text)
