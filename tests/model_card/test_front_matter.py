"""Front matter is read as the Hub reads it, and what is inherited has the types that the Hub wants."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from model_card import forbids_derivatives, inherited, source_card, split
from model_card.metadata import to_yaml

LICENSE = "cc-by-nc-nd-4.0"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\n\n"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n\n", "\ufeff\r\n \t"])
@pytest.mark.parametrize(("opening", "closing"), [("---", "---"), ("--- ", "---\t "), ("---", "..."), ("---", "---")])
def test_any_line_end_and_any_mark(end: str, before: str, opening: str, closing: str) -> None:
    card = split(before + end.join([opening, f"license: {LICENSE}", "language: en", closing, "", "# A model", ""]))
    assert card.metadata == {"license": LICENSE, "language": "en"} and card.problem is None
    assert card.body.strip() == "# A model" and forbids_derivatives(card) == LICENSE


@given(st.text("-. \t\r\na:#", max_size=40).map(lambda text: f"---\n{text}"))
@settings(max_examples=300, deadline=None)
def test_what_the_hub_takes_for_front_matter_is_taken_here(text: str) -> None:
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(text)
    header, body = source_card.parts(text)
    if match and not re.search(r"\r(?!\n)|\.\.\.", text):
        assert header is not None
        same = header.strip() == match[2].strip() and body == text[match.end() :]
        assert same or header == match[2].partition("\n---")[0]
    elif match:
        assert header is not None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *(("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("true", "true"), ("Null", None), ("~", None)),
        *(
            ("1.0", "1.0"),
            ("017", "017"),
            ("0o17", "0o17"),
            ("1e3", "1e3"),
            ("2024-99-99", "2024-99-99"),
            ("1:30", "1:30"),
        ),
        *(
            ("'null'", "null"),
            ('"\\u00e9"', "é"),
            ("!!str no", "no"),
            ("[no, nn]", ["no", "nn"]),
            ("[null, a]", [None, "a"]),
        ),
    ],
)
def test_texts_stay_texts(written: str, read: Any) -> None:
    assert split(f"---\nlanguage: {written}\n---\n").metadata["language"] == read


def test_anchors_aliases_and_merges_are_read() -> None:
    card = split("---\nbase: &b {license: x, language: en}\n<<: *b\nlicense: &l mit\nlicense_name: *l\n---\n")
    assert card.metadata == {"license": "mit", "language": "en", "license_name": "mit"}


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    "front",
    [
        *("- a\n- list", "key: [unclosed", "!!python/object/apply:os.system ['true']", "just words", "tags: !own x"),
        *("license: mit\nlicense: apache-2.0", "? [a]\n: b\n? [a]\n: c", f"{BOMB}tags: *a11", "tags: &t [*t]"),
        *("tags: " + "[" * 5000, "tags: \x07", "<<: 3", "x: &x\n  <<: *x\n<<: *x", "tags: [" + "a, " * 30_000 + "a]"),
    ],
)
def test_unreadable_front_matter_counts_as_none(front: str) -> None:
    begun = time.process_time()
    card = split(f"---\n{front}\n---\ntext\n")
    assert card.metadata == {} and card.body == "text\n"
    assert card.problem and "\n" not in card.problem and len(card.problem) <= source_card.LONGEST_PROBLEM
    assert time.process_time() - begun < 5


def test_a_license_is_heeded_in_unreadable_metadata_too() -> None:
    for text in (f"---\na: 1\na: 2\nlicense: {LICENSE}\n---\n", f"---\nlicense: {LICENSE}\n\n# no end mark\n"):
        card = split(text)
        assert card.problem and card.metadata == {} and forbids_derivatives(card) == LICENSE
    assert forbids_derivatives(split("# A text about cc-by-nd licenses\n")) is None


def test_cards_without_front_matter_keep_all_their_text() -> None:
    for text in ("# Title\n\n---\n\nrule above\n", "---\n\nA text under a rule.\n", ""):
        assert split(text) == source_card.SourceCard({}, text)
    assert split("---\n---\ntext\n") == source_card.SourceCard({}, "text\n")


VALUES = [
    *(
        "null",
        "true",
        "3",
        "1.5",
        "''",
        "x",
        "2024-01-01",
        "{a: b}",
        "{}",
        "[]",
        "[null]",
        "[[x]]",
        "[{a: 1}]",
        "[1, no]",
    ),
    *('"\\uD800"', '"a\\nb"', '"\\x1b[2J"', "[x, null, x]", ".inf", "!!binary aGk="),
]


@pytest.mark.parametrize("value", VALUES)
def test_whatever_stands_there_the_types_are_the_hubs(value: str) -> None:
    keys = (*source_card.WORDS, "widget", "extra_gated_prompt", "extra_gated_fields", "co2_eq_emissions", "thumbnail")
    card = split("---\n" + "".join(f"{key}: {value}\n" for key in keys) + "---\n")
    assert card.problem is None
    values, notes = inherited(card)
    assert isinstance(values["license"], str) and isinstance(values["pipeline_tag"], str)
    for key in ("language", "datasets"):
        words = values.get(key, "x")
        assert words and all(isinstance(word, str) and word for word in ([words] if isinstance(words, str) else words))
    for key in ("license_name", "license_link", "extra_gated_prompt"):
        assert isinstance(values.get(key, ""), str | bool | dict)
    assert all(isinstance(item, dict) for item in values.get("widget", []))
    assert "thumbnail" not in values and all("\n" not in note for note in notes)
    read = yaml.safe_load(to_yaml(values))
    assert read == values and "\x1b" not in to_yaml(values)
    to_yaml(values).encode("utf-8")


tricky = st.sampled_from(
    ["no", "1e3", "0o17", "0x1F", "1_000", "null", "~", "=", "<<", "on", "2024-01-01", "1:30", "+.5"]
)


@given(st.lists(tricky | st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1), min_size=1))
@settings(max_examples=100, deadline=None)
def test_written_texts_are_texts_in_both_versions_of_yaml(words: list[str]) -> None:
    written = to_yaml({"widget": words})
    assert yaml.safe_load(written) == {"widget": words}
    assert split(f"---\n{written}---\n").metadata == {"widget": words}
    assert not re.search(r"^- (?:1e3|0o17|0x1F|\+\.5)$", written, re.MULTILINE)


@pytest.mark.parametrize(
    ("stated", "word", "name"),
    [
        *(("mit", "mit", None), ("Apache-2.0", "apache-2.0", None), ("[mit]", "mit", None), ("[]", "other", None)),
        *(
            ("[mit, apache-2.0]", "other", "mit, apache-2.0"),
            ("MIT License", "other", "MIT License"),
            ("no", "other", "no"),
        ),
        *(("gpl-2.0-or-later", "other", "gpl-2.0-or-later"), ("{name: x}", "other", None), ("null", "other", None)),
    ],
)
def test_the_hub_gets_one_word_that_it_knows(stated: str, word: str, name: str | None) -> None:
    values, notes = inherited(split(f"---\nlicense: {stated}\n---\n"))
    assert (values["license"], values.get("license_name")) == (word, name)
    assert any("license: other" in note for note in notes) == (name is not None)


@pytest.mark.parametrize(
    ("front", "forbidden"),
    [
        *(("license: cc-by-nd-4.0", True), ("license: CC BY-NC-ND 4.0", True), ("license: [mit, cc-by-nd-4.0]", True)),
        *(("license: other\nlicense_name: no-derivatives", True), ("license: apache-2.0", False), ("a: b", False)),
        *(
            ("license: openmdw-1.0", False),
            ("license: x-ndx-1.0", False),
            ("license: other\nlicense_name: NoDerivs", True),
        ),
        ("license: other\nlicense_link: https://creativecommons.org/licenses/by-nd/4.0/", True),
    ],
)
def test_licenses_that_forbid_changed_copies(front: str, forbidden: bool) -> None:
    assert bool(forbids_derivatives(split(f"---\n{front}\n---\n"))) is forbidden
