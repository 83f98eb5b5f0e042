"""What is asked of the Hub's settings: an address without its credentials, and a folder for the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize import hub
from quantize.errors import ConfigError, HubUnreachable, StorageError
from quantize.hub.retries import translated


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://me:hf_secret@hub.example/", "https://hub.example"),
        ("http://hf_secret@127.0.0.1:8080/mirror/", "http://127.0.0.1:8080/mirror"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
    ],
)
def test_no_credentials_are_shown(given: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", given)
    assert hub.endpoint() == shown
    with pytest.raises(HubUnreachable, match=f"Hub at {shown} for a/b") as raised, translated("a/b"):
        raise TimeoutError
    assert "hf_secret" not in str(raised.value)


@pytest.mark.parametrize("given", ["me:hf_secret@hub.example", "https://", "https://[", "https://hub/?token=hf_secret"])
def test_what_is_no_address(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", given)
    with pytest.raises(ConfigError, match="HF_ENDPOINT is no address of a Hub") as raised:
        hub.api()
    assert "hf_secret" not in str(raised.value)


def test_a_cache_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(StorageError, match="set HOME, or HF_HOME"):
        hub.cache_folder()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/models/hub")
    assert hub.cache_folder() == Path("/models/hub")
