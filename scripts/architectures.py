"""Tries both recipes on a tiny model of every architecture of transformers, and writes docs/architectures.md.

scripts/architectures [NAME ...]     only those named, beside what was found before
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from quantize import methods, pipeline
from quantize.errors import QuantizeError
from quantize.evidence import Evidence
from quantize.parity import figures, generation
from quantize.progress import Silent
from quantize.records import EvaluationSettings, Recipe
from tests.models import tiny

ROOT = Path(__file__).parents[1]
PAGE, RECORD = ROOT / "docs/architectures.md", ROOT / "docs/architectures.json"
SECONDS, MEMORY = 180, 8 << 30
"""That one architecture may take."""
FIRST, PROMPTS = "llama", ("The function", "A list is")
LIBRARIES = ("transformers", "bitsandbytes", "torch")
SETTINGS = EvaluationSettings(max_windows=8, window=32, new_tokens=2, require="degraded")
RTN = Recipe(name="rtn")
CALIBRATED = methods.recipe_of({"name": "calibrated", "calibration_windows": 8, "calibration_length": 16, "passes": 0})
WORKS, FALLS_BACK, REFUSED, NOT_MADE, FAILS = "works", "falls back", "refused", "not made", "fails"
EQUAL, YES = "equal", "yes"
MEANINGS = {
    WORKS: "a package is made, tensor by tensor",
    FALLS_BACK: "a package is made, for which the model is loaded as a whole",
    REFUSED: "no package is made, and one line says why",
    NOT_MADE: "no tiny model could be made to try it",
    FAILS: "a fault of quantize",
}


TEXT = """# Architectures

Of {tried} architectures that transformers has as causal language models or as models of pictures and text, {packaged}
are packaged by the recipe rtn: {equal} of them with exactly the tensors that stock transformers and bitsandbytes write,
and {calibrated} by the calibrated recipe too. {refused} are refused, {not_made} could not be tried, and {fails} show a
fault of quantize.

`scripts/architectures` makes a tiny model of each with random weights, runs both recipes on it, compares every tensor
with stock's, and writes this page and architectures.json, with {versions}.
Tests compare this page with what the code does.

{meanings}

*In 4 bits* is the share of the tiny model's parameters, whose embeddings are large for its size; the card of a real
model names its own. *Stock* says whether the tensors are those that stock writes, and *calibrated* whether the
calibrated recipe works, on inputs that were compared with the model's own.

| architecture | | in 4 bits | stock | calibrated | why |
|---|---|---:|---|---|---|
"""


@dataclass(frozen=True)
class Trial:
    """What came of an architecture: the share of its parameters in 4 bits, and how its recipes went."""

    name: str
    state: str
    share: float | None = None
    stock: str = ""
    calibrated: str = ""
    reason: str = ""


class Notes(Silent):
    """Remembers what was noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def main(names: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    unknown = set(names) - set(tiny.architectures())
    if unknown:
        sys.exit(f"transformers {version('transformers')} has no {', '.join(sorted(unknown))}")
    held = {trial.name: trial for trial in read()} if names else {}
    with (
        mock.patch.object(figures, "draw"),  # they cost much, and tell nothing of an architecture
        mock.patch.object(generation, "prompts", lambda chat: PROMPTS),
        tempfile.TemporaryDirectory() as place,
    ):
        trial(FIRST, Path(place))  # here, so that what every trial imports is there
        for name in names or tiny.architectures():
            started = time.monotonic()
            held[name] = tried(name)
            print(f"{time.monotonic() - started:6.1f} s  {line(held[name])}", flush=True)
            write(held.values())


def tried(name: str) -> Trial:
    """What comes of an architecture, in a process of its own: some end theirs."""
    with tempfile.TemporaryDirectory(prefix="quantize-architectures-") as place:
        child = multiprocessing.get_context("fork").Process(target=_try, args=(name, Path(place)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about threads, of which none works yet
            child.start()
        child.join(SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            return Trial(name, FAILS, reason=f"takes more than {SECONDS} s")
        result = Path(place) / "trial.json"
        if not result.is_file():
            return Trial(name, FAILS, reason=f"the process ended with {child.exitcode}")
        return Trial(**json.loads(result.read_text()))


def _try(name: str, place: Path) -> None:
    import transformers

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    (place / "trial.json").write_text(json.dumps(dataclasses.asdict(trial(name, place))))


def trial(name: str, place: Path) -> Trial:
    """Make a tiny model of an architecture in the folder `place`, and try everything on it."""
    try:
        source = tiny.save(name, place / name)
    except Exception as error:  # noqa: BLE001 - whatever transformers says of sizes that do not fit together
        return Trial(name, NOT_MADE, reason=_said(error))
    notes = Notes()
    try:
        evidence = _package(source, place / "rtn", RTN, notes, unverified=False)
    except QuantizeError as error:
        return Trial(name, REFUSED, reason=_without_name(str(error), name))
    except Exception as error:  # noqa: BLE001 - a fault, which the page tells
        traceback.print_exc()
        return Trial(name, FAILS, reason=_said(error))
    whole = [note for note in notes.texts if note.endswith(": the model is loaded as a whole")]
    failed = [f"the check {check.name} failed: {check.detail}" for check in evidence.checks if not check.passed]
    return Trial(
        name,
        FAILS if failed else FALLS_BACK if whole else WORKS,
        share=evidence.coverage.quantized if evidence.coverage else None,
        stock=_like_stock(source, next(place.glob("rtn*")), place / "stock"),
        calibrated=_calibrated(source, place, name),
        reason="; ".join(failed) or "".join(whole).partition(": the model is")[0],
    )


def _package(source: Path, output: Path, recipe: Recipe, notes: Notes, *, unverified: bool) -> Evidence:
    request = pipeline.RunRequest(
        str(source), output=output, recipe=recipe, settings=SETTINGS, device="cpu", unverified=unverified
    )
    return pipeline.run(request, notes).package.evidence


def _calibrated(source: Path, place: Path, name: str) -> str:
    """Whether the calibrated recipe makes a package that stock transformers loads and that computes numbers."""
    import torch

    try:
        _package(source, place / "calibrated", CALIBRATED, Notes(), unverified=True)
        model = _stock_class(source).from_pretrained(place / "calibrated", local_files_only=True).eval()
        with torch.inference_mode():
            logits = model(torch.arange(16)[None]).logits
        return YES if bool(logits.isfinite().all()) else f"{FAILS}: its logits are no numbers"
    except QuantizeError as error:
        return _without_name(str(error), name)
    except Exception as error:  # noqa: BLE001 - a fault, which the page tells
        traceback.print_exc()
        return f"{FAILS}: {_said(error)}"


def _like_stock(source: Path, package: Path, output: Path) -> str:
    """Whether a package holds the very tensors that three lines of stock transformers and bitsandbytes write."""
    import torch
    from safetensors.torch import load_file
    from transformers import BitsAndBytesConfig

    own = json.loads((package / "config.json").read_text())["quantization_config"]
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=own["llm_int8_skip_modules"],
    )
    try:
        model = _stock_class(source).from_pretrained(
            source, quantization_config=asked, dtype=torch.bfloat16, device_map={"": "cpu"}, local_files_only=True
        )
        model.save_pretrained(output)
    except Exception as error:  # noqa: BLE001 - whatever stock does
        return f"stock fails: {_said(error)}"
    del model
    gc.collect()
    ours, theirs = (
        {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for folder in (package, output)
    )
    return _difference(ours, theirs)


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    import torch

    for name in sorted(ours.keys() ^ theirs.keys()):
        return f"{name} is in {'ours' if name in ours else 'theirs'} alone"
    for name, tensor in theirs.items():
        if (ours[name].dtype, ours[name].shape) != (tensor.dtype, tensor.shape):
            return f"{name} has another type or shape"
        if not torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (ours[name], tensor))):
            return f"{name} has other bytes"
    return EQUAL


def _stock_class(source: Path) -> Any:
    from quantize.formats.model_class import auto_class

    return auto_class(source)


def _said(error: Exception) -> str:
    """An error in one line."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def _without_name(text: str, name: str) -> str:
    """A message without the folder and the name of the tiny model, which the table names already."""
    words = [word for word in text.split(" ") if "quantize-architectures-" not in word]
    return " ".join(words).replace(f" {name} ", " this model ").strip(": ")


def read() -> list[Trial]:
    """What was found before."""
    return [Trial(**row) for row in json.loads(RECORD.read_text())["trials"]] if RECORD.is_file() else []


def write(trials: Iterable[Trial]) -> None:
    ordered = sorted(trials, key=lambda trial: trial.name)
    record = {
        "versions": {name: version(name) for name in LIBRARIES},
        "trials": [dataclasses.asdict(trial) for trial in ordered],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


def page(record: dict[str, Any]) -> str:
    """docs/architectures.md, from what docs/architectures.json holds."""
    trials = [Trial(**row) for row in record["trials"]]
    states = Counter(trial.state for trial in trials)
    packaged = [trial for trial in trials if trial.state in (WORKS, FALLS_BACK)]
    text = TEXT.format(
        tried=len(trials),
        packaged=len(packaged),
        equal=sum(trial.stock == EQUAL for trial in packaged),
        calibrated=sum(trial.calibrated == YES for trial in packaged),
        refused=states[REFUSED],
        not_made=states[NOT_MADE],
        fails=states[FAILS],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        meanings="\n".join(f"- **{state}**: {MEANINGS[state]}." for state in MEANINGS if states[state]),
    )
    return text + "".join(f"| {line(trial)} |\n" for trial in trials)


def line(trial: Trial) -> str:
    """A row of the table."""
    share = "" if trial.share is None else f"{100 * trial.share:.1f} %"
    cells = (f"`{trial.name}`", trial.state, share, trial.stock, trial.calibrated, trial.reason)
    return " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells)


if __name__ == "__main__":
    main(sys.argv[1:])
