"""License and notice files are carried whatever they are called, and so is what the card links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model_card import linked_file, split
from quantize import source
from quantize.package.sealing import copy_carried
from quantize.progress import Silent
from quantize.source.legal import is_legal
from tests.conftest import Outcome


@pytest.mark.parametrize(
    "path",
    [
        *("LICENSE", "license.md", "License.txt", "LICENCE", "LICENSE-MODEL", "LICENSE.Apache-2.0", "MODEL_LICENSE"),
        *("Llama-2-LICENSE.pdf", "NOTICE", "Notice.txt", "third_party_notices.html", "COPYING", "copying.lesser"),
        *("COPYRIGHT", "USE_POLICY.md", "Use Policy.txt", "acceptable-use-policy.md", "PATENTS", "LICENSES/MIT.txt"),
    ],
)
def test_legal_files(path: str) -> None:
    assert is_legal(path)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "README.md",
            "config.json",
            "license.py",
            "LICENSE.safetensors",
            "notice.bin",
            "onnx/LICENSE",
            "tokenizer.json",
        ),
        *("unnoticeable.txt", "licensing_model.gguf", "LICENSES/a/b.txt", "policy.txt"),
    ],
)
def test_other_files(path: str) -> None:
    assert not is_legal(path)


@pytest.mark.parametrize(
    ("link", "path"),
    [
        *(
            ("MODEL_TERMS", "MODEL_TERMS"),
            ("./docs/Terms%20of%20use.txt#part", "docs/Terms of use.txt"),
            ("/T.txt", "T.txt"),
        ),
        *(
            ("https://hub.example/org/m/blob/main/docs/T.txt?raw", "docs/T.txt"),
            ("https://hub.example/org/n/blob/main/T", None),
        ),
        *(
            ("https://e.example/T", None),
            ("../T", None),
            (".env", None),
            ("docs/.env", None),
            ("", None),
            ("a\\b", None),
        ),
        *(("//e.example/T", None), ("docs//T", None), ("file:T", None)),
    ],
)
def test_links_to_the_sources_own_files(link: str, path: str | None) -> None:
    assert linked_file(split(f'---\nlicense_link: "{link}"\n---\n'.replace("\\", "\\\\")), "org/m") == path


def test_legal_files_are_in_the_package_byte_for_byte(pocket_copy: Path, tmp_path: Path) -> None:
    names = ("terms/OURS", "License.txt", "Notice.txt", "acceptable_use_policy.md")
    (pocket_copy / "terms").mkdir()
    for name in names:
        (pocket_copy / name).write_bytes(f"text of {name}\r\n\xff".encode("latin-1"))
    (pocket_copy / "README.md").write_text("---\r\nlicense: other\r\nlicense_link: terms/OURS\r\n---\r\n")
    checkout = source.fetch(str(pocket_copy), revision=None, trust_remote_code=False, progress=Silent())
    carried = source.carried_files(checkout.source)
    copy_carried(checkout, carried, tmp_path / "package")
    for name in names:
        assert (tmp_path / "package" / name).read_bytes() == (pocket_copy / name).read_bytes()
    assert not {"README.md", "config.json", "model.safetensors"} & set(carried)


@pytest.mark.parametrize(
    "link", ["model.safetensors", "config.json", "README.md", "parity.json", "figures/a.png", "missing"]
)
def test_a_link_to_what_is_no_license_text_carries_nothing(pocket_copy: Path, link: str) -> None:
    (pocket_copy / "parity.json").write_text("{}")
    before = set(chosen(pocket_copy))
    (pocket_copy / "README.md").write_text(f"---\nlicense: other\nlicense_link: {link}\n---\n")
    assert set(chosen(pocket_copy)) == before


def chosen(folder: Path) -> tuple[str, ...]:
    checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
    return source.carried_files(checkout.source)


def test_a_config_does_not_paint_the_terminal(pocket_copy: Path, command: Callable[..., Outcome]) -> None:
    config = (pocket_copy / "config.json").read_text()
    painted = config.replace('"GPT2LMHeadModel"', r'"\u001b]0;title\u0007\u001b[2J\n::error title=x::made up\u202e"')
    assert painted != config
    (pocket_copy / "config.json").write_text(painted)
    outcome = command("run", pocket_copy, "-o", pocket_copy.parent / "out", "--device", "cpu")
    assert outcome.code == 1 and "\x1b" not in outcome.err and "\u202e" not in outcome.err
    assert "\\x1b]0;title" in outcome.err and "\n::error" not in outcome.err
