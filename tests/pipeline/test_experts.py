"""A mixture of experts from the source to the Hub, with the package's own code and no other."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import package, pipeline
from quantize.errors import PackageError
from quantize.files import blob_ids, records_of
from quantize.formats import experts
from quantize.package.sealing import UNSEALED
from quantize.progress import Silent
from quantize.publishing.audit import require_sound
from quantize.records import Recipe
from tests.conftest import QUICK, Outcome
from tests.mixtures import saved
from tests.publishing.workspace import MEASURING, Place

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mixture_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    original = saved("qwen3_moe", folder / "qwen3-moe")
    request = pipeline.RunRequest(
        str(original), output=folder / "made", recipe=Recipe(name="rtn"), settings=QUICK, device="cpu"
    )
    made = pipeline.run(request, Silent()).package
    assert made.evidence.verdict.passed, made.evidence.verdict
    assert made.folder == folder / "made"
    return made.folder


def test_the_package_has_its_code_and_says_so(mixture_package: Path) -> None:
    made = package.open_package(mixture_package)
    assert experts.own_record() in made.provenance.files
    assert len(made.provenance.quantized.modules) == 2 * (4 + 3 * 4)
    card = (mixture_package / "README.md").read_text("utf-8")
    assert "**Needs code.** Pass `trust_remote_code=True`" in card
    calls = re.findall(r"(?:from_pretrained|pipeline)\(.*device_map.*\)", card)
    assert len(calls) == 3 and all(call.endswith("trust_remote_code=True)") for call in calls)


def test_the_cards_first_snippet_runs(mixture_package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = (mixture_package / "README.md").read_text("utf-8")
    snippet = re.search(r"```python\n(from transformers import AutoModelForCausalLM.*?)```", card, re.DOTALL)
    assert snippet
    code = snippet[1].replace("'made'", repr(str(mixture_package))).replace('"made"', repr(str(mixture_package)))
    exec(compile(code, "card", "exec"), {})
    assert "Hello" in capsys.readouterr().out


def test_it_is_verified_without_a_flag(mixture_package: Path, tmp_path: Path, command: Callable[..., Outcome]) -> None:
    options = ("--against", mixture_package.with_name("qwen3-moe"), "--device", "cpu", *MEASURING)
    verified = command("verify", mixture_package, *options)
    assert verified.code == 0, verified.err


def test_other_code_is_neither_run_nor_published(
    mixture_package: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    """The hashes of the forged package are right."""
    forged = Path(shutil.copytree(mixture_package, tmp_path / "forged"))
    code = forged / experts.MODELING
    code.write_text(f"{code.read_text()}\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    made = package.open_package(forged)
    files = records_of(forged, without=UNSEALED)
    sealed = dataclasses.replace(made.provenance, files=files, blob_ids=blob_ids(forged, files))
    package.seal(forged, sealed)
    with pytest.raises(PackageError, match=r"modeling_experts\.py is code neither of the original nor of this version"):
        require_sound(package.open_package(forged))
    options = ("--against", mixture_package.with_name("qwen3-moe"), "--device", "cpu", *MEASURING)
    verified = command("verify", forged, *options)
    assert verified.code == 3 and "cannot load it" in verified.out + verified.err
    assert not (tmp_path / "ran").exists()


def test_it_is_published_and_proved_by_download(mixture_package: Path, place: Place, tmp_path: Path) -> None:
    original = str(mixture_package.with_name("qwen3-moe"))
    asked = ("--to", "tester/mixture", "--against", original, "--verify-download", "--json")
    pushed = place.quantize("push", str(mixture_package), *asked, folder=tmp_path)
    assert pushed.code == 0, pushed.err
    assert place.hub.files("tester/mixture")[experts.MODELING] == experts.OWN_CODE.read_bytes()
    assert json.loads(pushed.out)["downloaded"]["windows"] > 0
