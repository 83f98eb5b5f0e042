"""A folder that somebody else filled: nothing is read or written through what leads out of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import folders
from quantize.errors import CorruptModel, StorageError


def outside(file: Path) -> None:
    file.symlink_to(file.parents[1] / "secret")


def circle(file: Path) -> None:
    file.symlink_to(file)


def pipe(file: Path) -> None:
    os.mkfifo(file)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def listener(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unbound:
        here = Path.cwd()
        os.chdir(file.parent)  # the path of a socket may have a hundred letters
        try:
            unbound.bind(file.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("made", [outside, circle, pipe, device, listener, lambda file: file.symlink_to("absent")])
def test_what_is_no_file_of_the_folder(tmp_path: Path, made: Callable[[Path], None]) -> None:
    (tmp_path / "secret").write_text("a token")
    folder = tmp_path / "model"
    folder.mkdir()
    made(folder / "LICENSE")
    assert folders.listing(folder) == ["LICENSE"]
    with pytest.raises(CorruptModel, match=r"^LICENSE in .*model is "):
        folders.require_own(folder, ["LICENSE"], CorruptModel)


def test_a_linked_folder_leads_out_as_well(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "chat.jinja").write_text("text")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "templates").symlink_to(tmp_path / "elsewhere")
    assert folders.listing(folder) == ["templates/chat.jinja"]
    with pytest.raises(CorruptModel, match=r"templates/chat\.jinja in .* is a link to a file outside of that folder"):
        folders.require_own(folder, folders.listing(folder), CorruptModel)


@pytest.mark.parametrize("kept", ["models--a--b/blobs/12ab", "blobs/12/12ab"])
def test_the_hubs_cache_keeps_files_elsewhere(tmp_path: Path, kept: str) -> None:
    blob = tmp_path / kept
    blob.parent.mkdir(parents=True)
    blob.write_text("bytes")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(blob)
    (snapshot / "vocab.json").symlink_to("config.json")
    folders.require_own(snapshot, folders.listing(snapshot), CorruptModel)


def test_only_two_levels_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "deep").touch()
    (tmp_path / "a" / "there").touch()
    assert folders.listing(tmp_path) == ["a/there"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    target, card = tmp_path / "target", tmp_path / "README.md"
    target.write_text("mine")
    card.symlink_to(target)
    folders.write_text(card, "one\ntwo\n")
    assert (target.read_text(), card.read_bytes(), card.is_symlink()) == ("mine", b"one\ntwo\n", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "target"]


def test_a_home_that_nobody_knows() -> None:
    with pytest.raises(StorageError, match="there is no home folder of that user"):
        folders.expanded("~nobody-of-that-name/model")
