"""A card as an HTML page, about as the Hub shows it; no script in it can run."""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from pathlib import Path

from model_card import source_card

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
POLICY = "default-src 'none'; img-src data: https:; style-src 'unsafe-inline'"
RELATIVE_IMAGE = re.compile(r'(<img[^>]*\bsrc=")(?![a-z]+:|//)([^"]+)(")')


def page(card: str, folder: Path) -> str:
    """One HTML file of a card's text, with its front matter folded away and the pictures in `folder` inside it."""
    from markdown_it import MarkdownIt

    matter = source_card.FRONT_MATTER.match(card)
    header, body = (matter.group(1), card[matter.end() :]) if matter else ("", card)
    content = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    content = RELATIVE_IMAGE.sub(lambda image: image[1] + _embedded(folder, image[2]) + image[3], content)
    title = next((line.removeprefix("# ") for line in body.splitlines() if line.startswith("# ")), "model card")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<details class="metadata"><summary>metadata</summary><pre>{html.escape(header)}</pre></details>\n'
        f"{content}</html>\n"
    )


def _embedded(folder: Path, name: str) -> str:
    """A picture below `folder` as a data address; any other name stays as it is."""
    path = (folder / html.unescape(name)).resolve()
    kind, _ = mimetypes.guess_type(path.name)
    if not path.is_relative_to(folder.resolve()) or not path.is_file() or not (kind or "").startswith("image/"):
        return name
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
