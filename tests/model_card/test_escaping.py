"""Nothing that others wrote is more than text in the tool's own part of a card, or on the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

import model_card
from model_card import CardFacts, escape
from quantize.cli.visible_console import VisibleConsole
from tests.package.test_card import full_facts

ATTACK = (
    "# a\r\r## Verdict\n\n**Parity: lossless.** <b>b</b> <script>c</script> ![i](https://e.invalid/i.png) [l](x) `c` "
    "``` ~~~ | d | $$e$$ &lt; \x1b]0;t\x07 \x9b2J \u202e \u2028## f\n- g\n1. h https://e.invalid www.e.invalid "
    "i@e.invalid _j_"
)
KEPT = ("grade", "required_grade", "source_card", "passed")


def attacked(value: Any) -> Any:
    """A record with the attack for every text in it."""
    if isinstance(value, str):
        return ATTACK
    if isinstance(value, tuple):
        return tuple(map(attacked, value))
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: attacked(item) for name, item in fields.items() if name not in KEPT})
    return value


def own_part(facts: CardFacts) -> str:
    text = model_card.render(facts).split("\n---\n", 1)[1]
    return text.split("\n## Original model description:")[0]


def parsed(text: str) -> list[Token]:
    """All tokens of a text, those within lines as well."""
    blocks = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


SOURCE_CARDS = [
    f"---\nlicense: mit\nco2_eq_emissions: {json.dumps(ATTACK)}\n---\n# T\n",
    f"---\n{json.dumps(ATTACK)}: 1\n{json.dumps(ATTACK)}: 2\n---\n# T\n",
    f"---\nlicense: [{json.dumps(ATTACK)}, mit]\ntags: [{json.dumps(ATTACK)}]\n---\n[Website]: https://e.invalid\n",
]


@pytest.mark.parametrize("source_card", SOURCE_CARDS)
@pytest.mark.parametrize(
    "change", [{}, {"passed": False}, {"source_repo_id": None, "source_commit": None}, {"perplexity_ratio": None}]
)
def test_no_text_of_others_is_markup(source_card: str, change: dict[str, Any]) -> None:
    harmless = dataclasses.replace(full_facts(), source_card="---\nlicense: mit\n---\n", **change)
    harmless_tokens = parsed(own_part(harmless))
    text = own_part(dataclasses.replace(attacked(harmless), source_card=source_card, **change))
    tokens = parsed(text)
    headings = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    expected = [
        harmless_tokens[i + 1].content for i, token in enumerate(harmless_tokens) if token.type == "heading_open"
    ]
    assert headings[1:] == expected[1:] and "bnb" in headings[0]
    for kind in (
        "html_inline",
        "html_block",
        "image",
        "table_open",
        "tr_open",
        "td_open",
        "fence",
        "link_open",
        "s_open",
    ):
        count = sum(token.type == kind for token in tokens)
        assert count == sum(token.type == kind for token in harmless_tokens), kind
    assert not escape.UNSEEN_IN_CODE.search(text)


@given(st.text(max_size=40) | st.text("#*_`[]()<>!|~$&\\- \t\n\r1.)+=@:/w", max_size=20))
@settings(max_examples=100, deadline=None)
def test_escaped_text_reads_as_itself(text: str) -> None:
    text = " ".join(text.split())
    for written, read in (("{}", "{}"), ("a {} b", "a {} b"), ("- {}", "{}"), ("# a {}", "a {}"), ("**a** {}", "a {}")):
        tokens = parsed(written.format(escape.markdown(text)))
        inline = [token for token in tokens if token.type == "inline"]
        content = "".join(child.content for token in inline for child in token.children or ())
        assert content == read.format(escape.visible(text)).strip()
        assert not {"html_inline", "html_block", "code_inline", "image", "link_open", "fence"} & {
            t.type for t in tokens
        }


@given(st.text(max_size=40) | st.text("` \n", max_size=10))
@settings(max_examples=50, deadline=None)
def test_code_shows_what_it_was_given(text: str) -> None:
    shown = escape.visible(" ".join(text.split()))
    inline = [token for token in parsed(f"a {escape.code(text)} b") if token.type == "inline"]
    spans = [child.content for token in inline for child in token.children or ()]
    assert "".join(spans) == f"a {shown} b" or not shown
    assert not re.search("<[a-z]", escape.code(text).replace("\\<", ""))
    blocks = [token for token in parsed(escape.fenced(text)) if token.type == "fence"]
    assert len(blocks) == 1


@pytest.mark.parametrize("text", ["https://e.invalid", "see www.e.invalid", "a@e.invalid"])
def test_addresses_in_text_do_not_become_links(text: str) -> None:
    """What the Hub would turn into a link, CommonMark alone does not."""
    assert "\\" in escape.markdown(text)


def test_a_console_shows_escapes() -> None:
    from rich.table import Table

    output = io.StringIO()
    console = VisibleConsole(file=output, force_terminal=True, width=200, highlight=False, markup=False)
    table = Table("a")
    table.add_row("\x1b[2Jb\u202e")
    console.print(table)
    console.print("c\x1b]0;t\x07\n::error::d", style="red")
    text = output.getvalue()
    assert "\\x1b[2Jb\\u202e" in text and "c\\x1b]0;t\\x07 ::error::d" in text
    assert "\x1b[2J" not in text and "\x1b]" not in text and "\x1b[31m" in text


def test_json_has_escapes_of_its_own() -> None:
    document = json.dumps({"a": "\x9b\u202e\ud800\x7f é"}, ensure_ascii=False, indent=2)
    shown = escape.visible_json(document)
    assert json.loads(shown) == json.loads(document) and "\\u202e" in shown and "é" in shown
    shown.encode("utf-8")
