"""A model that was renamed on the Hub is known by its present name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantize import publishing, source
from quantize.errors import PublishError
from quantize.pipeline import RunRequest
from quantize.progress import Silent
from quantize.publishing import Destination, PublishRequest
from tests.hub import LoopbackHub

FORMER, PRESENT = "heron", "tester/heron"


@pytest.fixture
def renamed(tmp_path: Path, pocket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    with LoopbackHub() as hub:
        for name, value in hub.env(home=tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        hub.create_repo(PRESENT)
        hub.commit(PRESENT, {path.name: path for path in pocket.iterdir() if path.is_file()})
        hub.leave_former_name(FORMER, PRESENT)
        yield hub


def test_the_record_has_the_present_name(renamed: LoopbackHub) -> None:
    checkout = source.fetch(FORMER, revision=None, trust_remote_code=False, progress=Silent())
    assert (checkout.source.repo_id, checkout.source.name) == (PRESENT, "heron")
    assert checkout.source.commit == renamed.head(PRESENT)


def test_nothing_is_published_over_the_source(renamed: LoopbackHub) -> None:
    request = PublishRequest(RunRequest(FORMER), Destination(PRESENT, prune=True), dry_run=True)
    with pytest.raises(PublishError, match="tester/heron is the source itself"):
        publishing.deliver(request, Silent())
