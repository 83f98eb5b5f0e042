"""A package appears whole or not at all, and shows when it was changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize import package
from quantize.errors import PackageError, StorageError, described, storage_errors
from tests.conftest import Outcome
from tests.publishing.workspace import Place


def test_the_staging_folder_is_gone_after_success_failure_and_interruption(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "model-bnb-4bit"
    with package.staging_folder(output) as staging:
        assert staging.is_dir() and staging.parent == output.parent
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), package.staging_folder(output) as staging:
            (staging / "half").write_text("x")
            raise error
        assert list(output.parent.iterdir()) == []


def test_what_a_killed_run_left_is_removed_first(tmp_path: Path) -> None:
    output = tmp_path / "model-bnb-4bit"
    left = output.with_name(f"{output.name}{package.BUILDING}")
    left.mkdir()
    (left / "half").write_text("x")
    with package.staging_folder(output) as staging:
        assert list(staging.iterdir()) == []


def test_two_runs_do_not_build_the_same_package(tmp_path: Path) -> None:
    """Whatever way they come there, and wherever their temporary files lie; a killed one stands in nobody's way."""
    for name in ("models", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "models")
    waiter = (
        "from pathlib import Path; from quantize import package; import sys\n"
        "with package.staging_folder(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    output = tmp_path / "models" / "model-bnb-4bit"
    with subprocess.Popen(
        [sys.executable, "-c", waiter, str(tmp_path / "linked" / output.name)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(PackageError, match="another run is building"), package.staging_folder(output):
            pass
        other.kill()
    with package.staging_folder(output) as staging:
        assert staging.is_dir()
    assert list(output.parent.iterdir()) == []


def test_a_lock_whose_file_was_removed_is_not_held_twice(tmp_path: Path) -> None:
    """Many processes take turns; the file goes away between them, and no two of them are ever inside."""
    worker = (
        "import os, sys, time; from pathlib import Path; from quantize.errors import PackageError\n"
        "from quantize.files import locked\n"
        "path, done = Path(sys.argv[1]), 0\n"
        "while done < 40:\n"
        "  try:\n"
        "    with locked(path, PackageError('busy')):\n"
        "      os.close(os.open(f'{path}.inside', os.O_CREAT | os.O_EXCL)); os.unlink(f'{path}.inside'); done += 1\n"
        "  except PackageError: time.sleep(0.0005)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", worker, str(tmp_path / "out")]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_what_was_changed_after_it_was_measured_is_not_sealed(package_copy: Path) -> None:
    provenance = package.open_package(package_copy).provenance
    measured = tuple(file for file in provenance.files if file.path.endswith((".safetensors", "config.json")))
    assert package.seal(package_copy, provenance, measured).files == provenance.files
    with (package_copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PackageError, match=r"model\.safetensors was changed after it was measured"):
        package.seal(package_copy, provenance, measured)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json is changed"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda folder: (folder / "extra.txt").write_text("x"), r"extra\.txt is new"),
    ],
)
def test_changes_are_seen(package_copy: Path, damage: Callable[[Path], None], message: str) -> None:
    package.require_unchanged(package.open_package(package_copy))
    damage(package_copy)
    with pytest.raises(PackageError, match=message):
        package.require_unchanged(package.open_package(package_copy))


def test_one_changed_byte_of_the_weights_is_seen(package_copy: Path) -> None:
    with (package_copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(PackageError, match=r"model\.safetensors is changed"):
        package.require_unchanged(package.open_package(package_copy))


def test_only_packages_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(PackageError, match="exists and is not a package"):
        package.require_replaceable(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line(place: Place, tmp_path: Path) -> None:
    """The operating system refuses to write more than 1 MB a file, as a full disk would."""
    run = ("run", str(place.source), "--recipe", "rtn", "--output", str(tmp_path / "out"), "--device", "cpu")
    ended = place.warm.run(*run, cwd=tmp_path, largest_file=1_000_000)
    assert ended.code == 1, ended.err
    assert ended.err.splitlines()[-1].startswith("error: no space left while writing")
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.part"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    assert f"kept in {tmp_path}/out.unfinished" in ended.err.splitlines()[-1]


def test_no_write_permission_is_one_line(tmp_path: Path, command: Callable[..., Outcome], pocket: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    script = (
        "import os, sys, filelock; from pathlib import Path; from quantize import package, cli\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "from quantize.errors import StorageError\n"
        "try:\n  with package.staging_folder(Path(sys.argv[1])): pass\n"
        "except StorageError as error: print(error)"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and folder.owner() == locked.owner() and folder.name.startswith("pytest"):
            folder.chmod(0o755)
    outcome = subprocess.run(
        [sys.executable, "-c", script, str(locked / "out")], capture_output=True, text=True, check=True
    )
    assert str(locked) in outcome.stdout and "no permission" in outcome.stdout, outcome
    assert outcome.stdout.count("\n") == 1


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "receipt.json", "figures/kld.png"])
def test_a_package_with_links_is_refused_and_nothing_written_through_them(
    package_copy: Path, tmp_path: Path, command: Callable[..., Outcome], pocket: Path, name: str
) -> None:
    (tmp_path / "mine").write_text("mine")
    (package_copy / name).unlink(missing_ok=True)
    (package_copy / name).symlink_to(tmp_path / "mine")
    outcome = command("card", package_copy, "--against", pocket)
    assert outcome.code == 1
    assert f"{name} in {package_copy} is a link to a file outside of that folder" in outcome.err
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("ending", ["", package.REFUSED, package.UNFINISHED, package.BUILDING])
def test_no_package_is_built_through_a_link(tmp_path: Path, ending: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / f"model{ending}").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match=f"model{ending} is a symbolic link"):
        package.require_replaceable(tmp_path / "model")


@pytest.mark.parametrize("name", [".", "/", "..", "a/..", "model\n", os.fsdecode(b"model\xff")])
def test_what_no_folder_may_be_called(name: str) -> None:
    with pytest.raises(PackageError, match="is no name for a new folder"):
        package.require_replaceable(Path(name))


def test_finished_parts_are_named_with_their_size_or_removed(tmp_path: Path) -> None:
    output, parts = tmp_path / "out", tmp_path / "out.unfinished"

    def stop(*, clean: bool) -> str:
        with pytest.raises(PackageError) as raised, package.finished_parts(output, clean=clean) as folder:
            assert clean is False or not folder.exists()
            folder.mkdir(exist_ok=True)
            (folder / "part").write_bytes(bytes(2_500_000))
            raise PackageError("stopped")
        return described(raised.value)

    assert stop(clean=False).startswith(f"stopped; finished parts are kept in {parts} (2.5 MB): ")
    assert stop(clean=True) == "stopped" and not parts.exists()


def test_notes_of_a_cause_are_not_lost() -> None:
    with pytest.raises(StorageError) as raised, storage_errors("here"):
        error = OSError(28, "No space left on device")
        error.add_note("kept in a folder")
        raise error
    assert described(raised.value).endswith("; kept in a folder")
