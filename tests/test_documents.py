"""What counts as JSON and TOML from somebody else, and that everything else is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import documents
from quantize.errors import ConfigError, CorruptModel

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=40)
@given(content=st.dictionaries(st.text(), plain, max_size=4))
def test_what_python_writes_is_read(content: dict[str, Any]) -> None:
    assert documents.json_object(json.dumps(content), "here", CorruptModel) == content


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 levels deep"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 levels deep"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands there twice, with two values"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": ' + "9" * 100 + "}", "a number of more than 256 bits"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is too large a number"),
        ('{"a": 1', "is not JSON"),
        ("[1]", "is not a JSON object"),
        ("null", "is not a JSON object"),
    ],
)
def test_what_is_no_json_here(text: str, reason: str) -> None:
    with pytest.raises(CorruptModel, match=f"^here is not (?:JSON: .*)?.*{reason}|^here {reason}"):
        documents.json_object(text, "here", CorruptModel)


def test_what_configs_of_transformers_have() -> None:
    """State-space models have an infinite limit, tokenizers a length of 10^30, and some hands repeat a key."""
    text = '{"time_step_limit": [0.0, Infinity], "model_max_length": 1000000000000000019884624838656, "a": 1, "a": 1}'
    content = documents.json_object(text, "config.json", CorruptModel, finite=False)
    assert content["time_step_limit"] == [0.0, float("inf")]


def test_a_file_is_read_up_to_a_limit_and_as_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole, which takes no disk
    with pytest.raises(CorruptModel, match=r"config\.json has 1,099,511,627,776 bytes, and may have 33,554,432"):
        documents.read_json(file, "config.json", CorruptModel)
    file.write_bytes(b'{\n"a": "\xff"}')
    with pytest.raises(CorruptModel, match=r"config\.json is not UTF-8 text \(line 2\)"):
        documents.read_json(file, "config.json", CorruptModel)
    with pytest.raises(CorruptModel, match="is no regular file"):
        documents.read_json(tmp_path, "config.json", CorruptModel)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000 + "]" * 5000, "a = 0x" + "f" * 6000, "a = 1\na = 2", "a"])
def test_what_is_no_toml_here(tmp_path: Path, text: str) -> None:
    file = tmp_path / "catalogue.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"^here is not TOML: "):
        documents.read_toml(file, "here", ConfigError)
