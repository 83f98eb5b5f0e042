"""The catalogue: what can be written can be read, and whatever is wrong is named with its line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize import methods
from quantize.errors import ConfigError
from quantize.grades import GRADES
from quantize.options import COMPUTE_DTYPES, QUANT_TYPES
from quantize.publishing import catalogue
from quantize.records import EvaluationSettings, Recipe

Keys = dict[str, Any]

EXAMPLE = Path(__file__).parents[2] / "catalogue.toml"
MODEL = '[[model]]\nsource = "gpt2"\nrepo = "you/gpt2-bnb-4bit"\n'

lines_of_text = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "recipe": st.sampled_from(methods.names()),
    "target_grade": st.sampled_from(GRADES[:-1]),
    "max_size": st.integers(1, 9) | st.floats(1, 9),
    "size_budget": st.integers(1, 9) | st.floats(1, 9),
    "passes": st.integers(0, 9),
    "epochs": st.integers(0, 9),
    "outlier_threshold": st.integers(0, 9) | st.floats(0, 9),
    "hqq_iterations": st.integers(1, 2**40),
    "calibration": lines_of_text,
    "calibration_windows": st.integers(8, 2**40),
    "calibration_length": st.integers(16, 2**40),
    "calibration_seed": st.integers(0, 2**32 - 1),
    "bits": st.sampled_from([4, 8]),
    "quant_type": st.sampled_from(QUANT_TYPES),
    "double_quant": st.booleans(),
    "compute_dtype": st.sampled_from(COMPUTE_DTYPES),
    "skip_modules": st.lists(lines_of_text, max_size=3),
    "quantize_towers": st.booleans(),
    "corpus": lines_of_text,
    "window": st.integers(16, 2**40),
    "max_windows": st.integers(8, 2**40),
    "new_tokens": st.integers(1, 2**40),
    "seed": st.integers(0, 2**32 - 1),
    "full": st.booleans(),
    "controls": st.booleans(),
    "standard_perplexities": st.booleans(),
    "require": st.sampled_from(GRADES[:-1]),
    "revision": lines_of_text,
    "private": st.booleans(),
    "public": st.just(False),
    "allow_no_derivatives": st.booleans(),
    "max_source_gb": st.integers(1, 10**6) | st.floats(1e-6, 1e6),
}
some_keys = st.fixed_dictionaries({}, optional=VALUES)
ids = st.from_regex(r"[A-Za-z0-9]{1,8}(-[a-z0-9]{1,8}|_[a-z0-9]{1,8}|\.[a-f0-9]{1,3})?", fullmatch=True)
sources = ids | st.tuples(ids, ids).map("/".join)
catalogues = st.lists(st.tuples(sources, some_keys), min_size=1, max_size=5).map(
    lambda models: [
        {"source": source, "repo": f"you/{number}-bnb-4bit", **keys} for number, (source, keys) in enumerate(models)
    ]
)
around = st.sampled_from(["", "\n", "# [[model]]\n", "\n  # window = 3\n\n"])
forms = st.sampled_from(['{} = {}', '  "{}"={}', "'{}'   =  {}  # why", "\t{}\t= {}"])  # fmt: skip
headers = st.sampled_from(["[[model]]", "  [[ model ]]", '[["model"]] # the next', "[['model']]"])


def toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@st.composite
def texts(draw: st.DrawFn, defaults: Keys, models: list[Keys]) -> str:
    """A catalogue in one of the many ways to write it down."""

    def table(header: str, keys: Keys) -> str:
        written = [draw(around) + draw(forms).format(key, toml(value)) for key, value in keys.items()]
        return "\n".join([draw(around) + header, *written]) + "\n"

    parts = [table(draw(headers), model) for model in models]
    where = draw(st.integers(0, len(parts)))
    return "".join([*parts[:where], table("[defaults]", defaults), *parts[where:]])


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("catalogues") / "catalogue.toml"


def read(shelf: Path, text: str) -> tuple[catalogue.Entry, ...]:
    shelf.write_text(text, "utf-8")
    return catalogue.read(shelf).entries


def complaints(shelf: Path, text: str) -> list[str]:
    """What is said of a catalogue, line by line and without the folder."""
    with pytest.raises(ConfigError) as raised:
        read(shelf, text)
    return str(raised.value).replace(str(shelf), shelf.name).split("\n")


def said(entry: catalogue.Entry, key: str) -> Any:
    """What an entry says under a key of the file."""
    for option in methods.options():
        if option.catalogue_key == key:
            return entry.recipe.options.get(option.field, option.default)
    for holder, name in ((entry.recipe, "name" if key == "recipe" else key), (entry.settings, key), (entry, key)):
        if hasattr(holder, name):
            value = getattr(holder, name)
            return list(value) if isinstance(value, tuple) else value
    raise AssertionError(f"nothing holds {key}")


def sensible(defaults: Keys, keys: Keys) -> Keys:
    """The keys without options that their recipe does not have."""
    own = methods.options((defaults | keys).get("recipe", Recipe.name))
    foreign = {option.catalogue_key for option in methods.options() if option not in own}
    return {key: value for key, value in keys.items() if key not in foreign}


@given(st.data(), some_keys, catalogues)
@pytest.mark.slow
def test_what_is_written_is_read(shelf: Path, data: st.DataObject, defaults: Keys, models: list[Keys]) -> None:
    models = [sensible(defaults, model) for model in models]
    text = data.draw(texts(defaults, models))
    entries = read(shelf, text)
    assert len(entries) == len(models)
    for entry, model in zip(entries, models, strict=True):
        expected = sensible({}, {**defaults, **model})
        assert {key: said(entry, key) for key in expected} == expected
        untouched = catalogue.Entry(0, "", "")
        assert all(said(entry, key) == said(untouched, key) for key in VALUES.keys() - expected.keys())
        assert text.split("\n")[entry.line - 1].lstrip().startswith("[[")


BROKEN = [
    ("requier", "good", "unknown key 'requier': is require meant?"),
    ("colour", "red", "unknown key 'colour'"),
    ("require", "best", "require is one of lossless, parity, good, degraded, not 'best'"),
    ("require", "failed", "require is one of lossless, parity, good, degraded, not 'failed'"),
    ("bits", 5, "bits is one of 4, 8, not 5"),
    ("bits", 4.0, "bits is one of 4, 8, not 4.0"),
    ("bits", "4", "bits is one of 4, 8, not '4'"),
    ("recipe", "magic", f"recipe is one of {', '.join(methods.names())}, not 'magic'"),
    ("quant_type", True, "quant_type is one of nf4, fp4, not true"),
    ("double_quant", 1, "double_quant is true or false, not 1"),
    ("compute_dtype", "int4", "compute_dtype is one of auto, float16, bfloat16, float32, not 'int4'"),
    ("skip_modules", "h.0", "skip_modules is a list of names, not 'h.0'"),
    ("skip_modules", ["h.0", 1], "skip_modules is a list of names, not ['h.0', 1]"),
    ("corpus", "", "corpus is one line of text, not ''"),
    ("window", 15, "window is a whole number of at least 16, not 15"),
    ("window", 64.0, "window is a whole number of at least 16, not 64.0"),
    ("max_windows", 7, "max_windows is a whole number of at least 8, not 7"),
    ("new_tokens", True, "new_tokens is a whole number of at least 1, not true"),
    ("seed", 2**32, "seed is a whole number from 0 to 4294967295, not 4294967296"),
    ("seed", -1, "seed is a whole number from 0 to 4294967295, not -1"),
    ("full", "yes", "full is true or false, not 'yes'"),
    ("revision", 3, "revision is one line of text, not 3"),
    ("private", 0, "private is true or false, not 0"),
    ("max_source_gb", 0, "max_source_gb is a number above 0, not 0"),
    ("max_source_gb", True, "max_source_gb is a number above 0, not true"),
]


@given(st.data(), some_keys, catalogues, st.sampled_from(BROKEN))
def test_a_broken_key_is_named_with_its_line(
    shelf: Path, data: st.DataObject, defaults: Keys, models: list[Keys], broken: tuple[str, Any, str]
) -> None:
    key, value, words = broken
    models = [sensible(defaults, model) for model in models]
    victim = data.draw(st.sampled_from([defaults, *models]))
    victim.pop(key, None)
    position = data.draw(st.integers(0, len(victim)))
    items = list(victim.items())
    victim.clear()
    victim.update([*items[:position], (key, value), *items[position:]])
    text = data.draw(texts(defaults, models))
    written = re.compile(rf"""\s*["']?{key}["']?\s*=\s*{re.escape(toml(value))}(  # why)?""")
    [line] = [number for number, line in enumerate(text.split("\n"), start=1) if written.fullmatch(line)]
    assert complaints(shelf, text) == [f"catalogue.toml:{line}: {words}"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.5])
def test_a_size_is_a_real_one(shelf: Path, value: float) -> None:
    assert complaints(shelf, f"{MODEL}max_source_gb = {value}\n") == [
        f"catalogue.toml:4: max_source_gb is a number above 0, not {value}"
    ]


@pytest.mark.parametrize(
    "name",
    ["./gpt2", "../gpt2", "/models/gpt2", "~/gpt2", "a/b/c", "a--b/c", "a/b.git", "a/b..c", "-a/b", "a/", "", "é/b"],
)
@pytest.mark.parametrize("key", ["source", "repo"])
def test_only_hub_ids_name_models(shelf: Path, key: str, name: str) -> None:
    given = {"source": "gpt2", "repo": "you/gpt2-bnb-4bit"} | {key: name}
    text = f'[[model]]\nsource = "{given["source"]}"\nrepo = "{given["repo"]}"\n'
    [complaint] = complaints(shelf, text)
    assert complaint.startswith(f"catalogue.toml:{2 if key == 'source' else 3}: {key} is a Hub id")
    assert complaint.endswith(f"not {name!r}")


def test_a_repo_needs_an_owner(shelf: Path) -> None:
    assert complaints(shelf, '[[model]]\nsource = "gpt2"\nrepo = "gpt2-bnb-4bit"\n') == [
        "catalogue.toml:3: repo is a Hub id with its owner, such as you/distilgpt2-bnb-4bit, not 'gpt2-bnb-4bit'"
    ]


def test_a_repo_belongs_to_one_entry_and_is_not_the_source(shelf: Path) -> None:
    text = MODEL + MODEL.replace("you/", "YOU/") + '[[model]]\nsource = "a/b"\nrepo = "A/b"\n' + MODEL
    assert complaints(shelf, text) == [
        "catalogue.toml has 3 problems:",
        "catalogue.toml:6: repo YOU/gpt2-bnb-4bit is already that of line 3",
        "catalogue.toml:9: repo is the source itself",
        "catalogue.toml:12: repo you/gpt2-bnb-4bit is already that of line 3",
    ]
    inline = 'model = [{source = "a/b", repo = "c/d"}, {source = "a/e", repo = "c/d"}]'
    assert complaints(shelf, inline) == ["catalogue.toml:1: repo c/d is already that of line 1"]


def test_every_problem_is_named_at_once(shelf: Path) -> None:
    text = """
colour = "red"
window = 64

[default]
bits = 4

[[models]]
source = "gpt2"

[defaults]
source = "gpt2"
window = true

[[model]]
repo = "you/one"
bits = 3
seed = -1

[model.extra]
max_source_gb = 3
"""
    assert complaints(shelf, text) == [
        "catalogue.toml has 10 problems:",
        "catalogue.toml:2: unknown key 'colour'",
        "catalogue.toml:3: window belongs below [defaults] or [[model]]",
        "catalogue.toml:5: unknown key 'default': is [defaults] meant?",
        "catalogue.toml:8: unknown key 'models': is [[model]] meant?",
        "catalogue.toml:12: source belongs below [[model]]",
        "catalogue.toml:13: window is a whole number of at least 16, not true",
        "catalogue.toml:15: source is missing: a Hub id such as distilbert/distilgpt2, never a folder",
        "catalogue.toml:15: unknown key 'extra'",
        "catalogue.toml:17: bits is one of 4, 8, not 3",
        "catalogue.toml:18: seed is a whole number from 0 to 4294967295, not -1",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "1: no model is listed: add [[model]] with its source and repo"),
        ("[defaults]\nbits = 4\n", "1: no model is listed: add [[model]] with its source and repo"),
        ("\n[model]\nsource = 'gpt2'\n", "2: each model is a table [[model]], in double brackets"),
        ("\nmodel = [1]\n", "2: each model is a table [[model]], in double brackets"),
        (f"\n[[defaults]]\nbits = 4\n{MODEL}", "2: [defaults] is one table, in single brackets"),
        (f"\n{MODEL}skip_modules = [\n  'h.0',\n  3,\n]", "5: skip_modules is a list of names, not ['h.0', 3]"),
    ],
)
def test_odd_shapes(shelf: Path, text: str, complaint: str) -> None:
    assert complaints(shelf, text) == [f"catalogue.toml:{complaint}"]


@pytest.mark.parametrize("quotes", ["'''", '"""'])
def test_a_text_of_several_lines_holds_no_keys(shelf: Path, quotes: str) -> None:
    _, *found = complaints(
        shelf, f"{MODEL}corpus = {quotes}\n[[model]]\nbits = 3{quotes}  # {quotes}\nbits = 5\n{MODEL}x = 1"
    )
    places = [complaint.split(" is ")[0] for complaint in found]
    assert places[:2] == ["catalogue.toml:4: corpus", "catalogue.toml:7: bits"]
    assert found[3] == "catalogue.toml:11: unknown key 'x'"


def test_what_cannot_be_read_is_one_line(shelf: Path, tmp_path: Path) -> None:
    [syntax] = complaints(shelf, f"{MODEL}bits = = 4\n")
    assert syntax.startswith("catalogue.toml is not TOML: ") and "line 4" in syntax
    [twice] = complaints(shelf, f"{MODEL}bits = 4\nbits = 8\n")
    assert "line 5" in twice
    [huge] = complaints(shelf, f"{MODEL}seed = {'9' * 5000}\n")
    assert "is not TOML" in huge
    shelf.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        catalogue.read(shelf)
    for missing in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read: |is no regular file"):
            catalogue.read(missing)


values = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | lines_of_text,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
names = st.sampled_from([*VALUES, "source", "repo", "colour"])


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(["[[model]]", "[defaults]", "[model]", "[[defaults]]", "[other]", "[model.x]", '"""', "'''"])
        | st.tuples(names, values).map(lambda pair: f"{pair[0]} = {toml(pair[1])}"),
        max_size=10,
    ).map("\n".join)
)
def test_no_text_breaks_the_reader(shelf: Path, text: str) -> None:
    try:
        entries = read(shelf, text)
    except ConfigError:
        return
    assert entries and all(isinstance(entry, catalogue.Entry) for entry in entries)


def test_windows_line_ends_change_nothing(shelf: Path) -> None:
    shelf.write_bytes(f"{MODEL}bits = 3\n".replace("\n", "\r\n").encode())
    with pytest.raises(ConfigError, match=r"catalogue\.toml:4: bits"):
        catalogue.read(shelf)


def test_every_field_of_a_recipe_and_of_the_settings_has_a_key() -> None:
    mine = {"source", "repo", *VALUES}
    assert mine == catalogue.REQUIRED.keys() | catalogue.OPTIONAL.keys()
    of_records = {field.name for record in (Recipe, EvaluationSettings) for field in dataclasses.fields(record)}
    assert of_records - {"name", "options"} <= mine


def test_a_field_without_a_rule_of_its_own_accepts_its_default() -> None:
    for key, rule in catalogue.OPTIONAL.items():
        default = said(catalogue.Entry(0, "", ""), key)
        assert rule.accepts(default) or key in ("revision", "max_source_gb"), key


def test_the_example_can_be_used() -> None:
    [entry] = catalogue.read(EXAMPLE).entries
    assert (entry.source, entry.repo) == ("distilbert/distilgpt2", "your-name/distilgpt2-bnb-4bit")


def test_former_names_are_read_with_a_note(shelf: Path) -> None:
    """The first line of each is named, in the defaults and in a model, in tables and in a list."""
    former = MODEL.replace("repo =", "target =")
    again = former.replace("bnb-4bit", "again")
    shelf.write_text(f"[defaults]\nconventions = true\n\n{former}recipe = \"stock\"\n\n{again}'sweeps' = 3\n")
    result = catalogue.read(shelf)
    first, second = result.entries
    assert (first.repo, first.recipe.name, first.settings.standard_perplexities) == ("you/gpt2-bnb-4bit", "rtn", True)
    assert (second.repo, second.recipe.options) == ("you/gpt2-again", {"passes": 3})
    assert [note.replace(str(shelf), shelf.name) for note in result.notes] == [
        "note: catalogue.toml:2: conventions is called standard_perplexities now",
        "note: catalogue.toml:6: target is called repo now",
        "note: catalogue.toml:7: stock is called rtn now",
        "note: catalogue.toml:12: sweeps is called passes now",
    ]
    shelf.write_text('model = [{source = "a/b", target = "c/d"}]')
    assert [note.replace(str(shelf), shelf.name) for note in catalogue.read(shelf).notes] == [
        "note: catalogue.toml:1: target is called repo now"
    ]
    shelf.write_text(MODEL)
    assert catalogue.read(shelf).notes == ()


def test_a_key_is_not_given_under_two_names(shelf: Path) -> None:
    assert complaints(shelf, f'{MODEL}target = "you/other"\n') == [
        "catalogue.toml:4: target is called repo now, which is given as well: leave target out"
    ]


def test_an_option_that_the_recipe_does_not_have_is_named(shelf: Path) -> None:
    assert complaints(shelf, f'[defaults]\nrecipe = "stock"\n{MODEL}bits = 4\npasses = 3\n') == [
        "catalogue.toml:7: the recipe rtn has no passes: leave it out, or choose another recipe"
    ]
    assert read(shelf, f'[defaults]\npasses = 3\n{MODEL}recipe = "rtn"\n')[0].recipe.options == {}
