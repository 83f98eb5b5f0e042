"""A card as an HTML page, about as the Hub shows it: nothing in it can run, lead away by itself, or send anything."""

from __future__ import annotations

import base64
import html
import itertools
import mimetypes
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_card import html_tags, source_card

if TYPE_CHECKING:
    from markdown_it.token import Token

STYLE = """
body { max-width: 48rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.6 system-ui, sans-serif; color: #1f2933; }
h1, h2, h3 { line-height: 1.25; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
pre { background: #f4f5f7; padding: .8rem; overflow-x: auto; border-radius: 6px; font-size: .875rem; }
code { background: #f4f5f7; padding: .1rem .25rem; border-radius: 4px; font-size: .9em; overflow-wrap: anywhere; }
pre code { padding: 0; background: none; overflow-wrap: normal; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid #d5d9e0; padding: .35rem .7rem; }
blockquote { border-left: 4px solid #d08c3f; margin: 1rem 0; padding: .1rem 1rem; background: #fdf6ec; }
details.metadata { border: 1px solid #d5d9e0; border-radius: 6px; padding: .5rem 1rem; }
"""
POLICY = (
    "default-src 'none'; img-src data: https:; media-src https:; style-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)
NAMES_OF_ELEMENTS = """
    a abbr b bdi bdo blockquote br caption center cite code col colgroup dd del details dfn div dl dt em figcaption
    figure font h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p picture pre q rp rt ruby s samp small source span strike
    strong sub summary sup table tbody td tfoot th thead tr tt u ul var video audio wbr
"""
NAMES_OF_ATTRIBUTES = """
    abbr align alt border cellpadding cellspacing cite color colspan controls datetime dir height href hspace id lang
    loop media muted name open poster reversed rowspan scope size span src srcset start title type valign vspace width
"""
ELEMENTS, ATTRIBUTES = frozenset(NAMES_OF_ELEMENTS.split()), frozenset(NAMES_OF_ATTRIBUTES.split())
"""What HTML of a card may be; everything else, such as meta, base, form, link, style and script, is left out."""
SAFE_ADDRESS = re.compile(r"(?:https?:|mailto:|data:image/)|[^:]*(?:[/?#]|$)", re.IGNORECASE)
UNSHOWN = re.compile(r"<!--.*?(?:-->|\Z)|<[?!][^>]*>", re.DOTALL)
ADDRESSES = ("href", "src", "poster", "cite")


def page(card: str, folder: Path) -> str:
    """One HTML file of a card's text, with its front matter folded away and the pictures in `folder` inside it."""
    from markdown_it import MarkdownIt

    header, body = source_card.parts(card)
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    parser.add_render_rule("html_block", _html)
    parser.add_render_rule("html_inline", _html)
    parser.add_render_rule("image", _image)
    environment = {"folder": folder}
    tokens = parser.parse(body, environment)
    _name_headings(tokens)
    content = parser.renderer.render(tokens, parser.options, environment)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(_title(tokens))}</title>\n<style>{STYLE}</style>\n"
        f'<details class="metadata"><summary>metadata</summary><pre>{html.escape(header or "")}</pre></details>\n'
        f"{content}</html>\n"
    )


def _title(tokens: Sequence[Token]) -> str:
    """The text of the first heading of the first level."""
    for index, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h1":
            return "".join(child.content for child in tokens[index + 1].children or ())
    return "model card"


def _name_headings(tokens: Sequence[Token]) -> None:
    """Give each heading the name that links within the card lead to, as the Hub does."""
    for opening, content in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrs["id"] = re.sub(r"[^\w -]", "", content.content.lower()).replace(" ", "-")


def _html(_: Any, tokens: Sequence[Token], index: int, __: Any, environment: dict[str, Any]) -> str:
    return sanitized(tokens[index].content, environment["folder"])


def _image(renderer: Any, tokens: Sequence[Token], index: int, options: Any, environment: dict[str, Any]) -> str:
    token = tokens[index]
    token.attrs["src"] = _embedded(environment["folder"], str(token.attrs["src"]))
    return str(renderer.image(tokens, index, options, environment))


def sanitized(text: str, folder: Path) -> str:
    """HTML with the elements and attributes that a card may have; what is no whole tag becomes text."""
    pieces, position = [], 0
    for tag in html_tags.tags(text):
        pieces.append(_as_text(text[position : tag.start]))
        pieces.append(_tag(tag, folder) if tag.name in ELEMENTS else "")
        position = tag.content_end
    return "".join([*pieces, _as_text(text[position:])])


def _as_text(text: str) -> str:
    """Text between tags; its entities stay, comments and halves of tags do not."""
    return UNSHOWN.sub("", text).replace("<", "&lt;").replace(">", "&gt;")


def _tag(tag: html_tags.Tag, folder: Path) -> str:
    if tag.closing:
        return f"</{tag.name}>"
    attributes = []
    for attribute in tag.attributes:
        if attribute.name in ATTRIBUTES and _is_safe(attribute):
            value = _embedded(folder, attribute.value) if attribute.name == "src" else attribute.value
            attributes.append(f' {attribute.name}="{html.escape(value)}"')
    return f"<{tag.name}{''.join(attributes)}>"


def _is_safe(attribute: html_tags.Attribute) -> bool:
    address = re.sub(r"[\x00-\x20]+", "", attribute.value)
    return attribute.name not in ADDRESSES or bool(SAFE_ADDRESS.match(address))


def _embedded(folder: Path, name: str) -> str:
    """A picture below `folder` as a data address; any other name stays as it is."""
    try:
        path = (folder / urllib.parse.unquote(name)).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return name
    kind, _ = mimetypes.guess_type(path.name)
    if not inside or not (kind or "").startswith("image/"):
        return name
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
