"""A card as a page: nothing in it runs, leads away by itself, or sends anything."""

from __future__ import annotations

import html.parser
from pathlib import Path

import pytest

from model_card import page

PICTURE = b"\x89PNG\r\n\x1a\n"


class Elements(html.parser.HTMLParser):
    """The elements and attributes of a page as a browser would take them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


def body_of(text: str, folder: Path) -> str:
    return page(text, folder).split("</details>\n", 1)[1]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "<script>x()</script>",
            "a <script>x()</script>",
            "<style>p{}</style>",
            "<STYLE\n>p{}</STYLE>",
            "<base href=x>",
        ),
        *("<meta http-equiv=refresh content='0;url=https://e.invalid'>", "a <link rel=stylesheet href=x> b"),
        *(
            "<form action=https://e.invalid><input><button>x</button></form>",
            "<iframe src=x>",
            "<object data=x>",
            "<embed>",
        ),
        *(
            "<svg onload=x()><style><img onerror=x()>",
            "<p onclick=x() style='position:fixed'>",
            "<img src=x onerror=x()>",
        ),
        *(
            "<a href='javascript:x()'>",
            "<a href=' java\nscript:x()'>",
            "<a href='&#106;avascript:x()'>",
            "<math><mtext>",
        ),
        *(
            "<div\n<script>x()</script>",
            "<style x",
            "<p title='",
            "<!-- x --!><script>x()</script> -->",
            "<![CDATA[<script>]]>",
        ),
        *(
            "<?php <script>x()</script> ?>",
            "<a href=data:text/html,x>",
            "<textarea></textarea><script>x()</script>",
            "<noscript>",
        ),
    ],
)
def test_only_what_a_card_may_have_is_left(text: str, tmp_path: Path) -> None:
    for card in (text, f"# T\n\n{text}\n\nrest", f"> {text}"):
        elements = Elements()
        elements.feed(body_of(card, tmp_path))
        forbidden = {
            "script",
            "style",
            "meta",
            "base",
            "link",
            "form",
            "input",
            "button",
            "iframe",
            "object",
            "embed",
            "svg",
        }
        assert not forbidden & set(elements.names)
        for name, value in elements.attributes:
            assert not name.startswith("on") and name != "style"
            assert not (value or "").lower().strip().startswith(("javascript", "data:text"))


def test_what_a_card_may_have_stays(tmp_path: Path) -> None:
    image, link = '<img src="x.png" width=3 alt="a&quot;b">', '<a href="#t">t</a>'
    text = f"<details><summary>S</summary>\n\n**b** {image} {link} a &lt; b\n\n</details>"
    shown = body_of(text, tmp_path)
    assert "<details><summary>S</summary>" in shown and "<strong>b</strong>" in shown and "a &lt; b" in shown
    assert '<img src="x.png" width="3" alt="a&quot;b">' in shown and '<a href="#t">t</a>' in shown


def test_pictures_of_the_folder_are_inside_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a b.png").write_bytes(PICTURE)
    (folder / "notes.txt").write_text("x")
    (tmp_path / "secret.png").write_bytes(PICTURE)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    shown = page(
        "![a](<a b.png>) <img src='a b.png'> ![s](../secret.png) ![l](link.png) ![n](notes.txt) ![x](a%00b)", folder
    )
    assert shown.count("data:image/png;base64,") == 2
    assert 'src="../secret.png"' in shown and 'src="link.png"' in shown and 'src="notes.txt"' in shown


def test_the_policy_and_the_title(tmp_path: Path) -> None:
    shown = page("---\na: </pre><script>\n---\n# A *b* <i>c</i> &amp; d\n", tmp_path)
    assert "form-action 'none'; base-uri 'none'" in shown and "default-src 'none'" in shown
    assert "&lt;script&gt;" in shown and "<script" not in shown
