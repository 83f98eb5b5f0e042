"""Calibration text and corpus are told apart by content: copies in any script, with changes, in other spelling."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.methods.calibration.calibration_text import MAX_OVERLAP
from quantize.methods.calibration.overlap import COPIED, Passages, letters
from quantize.parity.corpus import builtin_text, is_reserved

SCRIPTS = {
    "Latin": (0x61, 26, " "),
    "Cyrillic": (0x430, 32, " "),
    "Arabic": (0x628, 27, " "),
    "Devanagari": (0x915, 37, " "),
    "Thai": (0xE01, 46, ""),
    "Chinese": (0x4E00, 3000, ""),
    "Japanese": (0x3042, 80, ""),
    "Korean": (0xAC00, 11000, " "),
}
CHANGES: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "without spaces": lambda text: "".join(text.split()),
    "one letter a line": "\n".join,
    "punctuation": lambda text: text.replace("a", "a-").replace(" ", ", "),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "full width": lambda text: "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in text),
    "zero width": "\u200b".join,
}


def text_in(script: str, words: int, seed: int) -> list[str]:
    first, count, _ = SCRIPTS[script]
    chance = random.Random(seed)
    return ["".join(chr(first + chance.randrange(count)) for _ in range(chance.randint(2, 8))) for _ in range(words)]


def other_half() -> str:
    """The topics of Python's own help that are not reserved for the built-in corpus: prose of its very kind."""
    from pydoc_data.topics import topics

    reserved = set(builtin_text().split("\n\n"))
    parts = (part for name in sorted(topics) if not is_reserved(name) for part in topics[name].split("\n\n"))
    return "\n\n".join(part for part in dict.fromkeys(map(str.strip, parts)) if part not in reserved)


def windows(text: str, size: int = 2000) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text) - size, size)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_copies_in_any_script(script: str) -> None:
    """Of a few words, and of a page of which every seventh word is another one; not what is only of the same script."""
    space = SCRIPTS[script][2]
    corpus = text_in(script, 2000, seed=1)
    known = Passages.of(space.join(corpus))
    other = text_in(script, 300, seed=2)
    assert not known.repeated_by(space.join(other))
    assert known.repeated_by(space.join([*other[:150], *corpus[700:730], *other[150:]]))
    changed = [other[number % 300] if number % 7 == 0 else word for number, word in enumerate(corpus[500:800])]
    assert known.repeated_by(space.join(changed))


@pytest.fixture(scope="module")
def known() -> Passages:
    return Passages.of(builtin_text())


@pytest.mark.parametrize("change", CHANGES)
def test_copies_in_another_spelling(known: Passages, change: str) -> None:
    copy = [CHANGES[change](window) for window in windows(builtin_text())[:10]]
    assert all(map(known.repeated_by, copy)) and known.share_in(copy) == 1


def test_prose_of_the_same_kind_is_no_copy(known: Passages) -> None:
    others = windows(other_half())
    assert len(others) > 50 and known.share_in(others) < MAX_OVERLAP
    assert known.share_in([*others, *windows(builtin_text())[:3]]) > MAX_OVERLAP


@given(st.text(min_size=COPIED, max_size=300), st.text(max_size=80), st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_what_holds_all_letters_of_a_text_repeats_it(text: str, before: str, after: str) -> None:
    if len(letters(text)) >= COPIED and letters(text) in letters(f"{before} {text} {after}"):
        assert Passages.of(text).repeated_by(f"{before} {text} {after}")
    assert Passages.of("").repeated_by(text) is False
