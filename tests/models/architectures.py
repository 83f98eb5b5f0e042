"""Both recipes on a tiny model of one architecture after the other, and the page that says what came of them."""

from __future__ import annotations

import gc
import json
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import methods, source
from quantize.errors import QuantizeError
from quantize.formats import experts, source_model
from quantize.formats.bitsandbytes import checks, coverage, modules
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.model_class import auto_class
from quantize.progress import Silent
from quantize.records import Checkout, Recipe
from tests.models import tiny

ROOT = Path(__file__).parents[2]
PAGE, RECORD = ROOT / "docs/architectures.md", ROOT / "docs/architectures.json"
TOKENS = 16
RTN = Recipe(name="rtn")
CALIBRATED = methods.recipe_of({"name": "calibrated", "calibration_windows": 8, "calibration_length": 16, "passes": 0})
WORKS, FALLS_BACK, REFUSED, NOT_MADE, FAILS = "works", "falls back", "refused", "not made", "fails"
EQUAL, BESIDES, YES = "equal", "equal besides experts", "yes"
MEANINGS = {
    WORKS: "a package is made, tensor by tensor",
    FALLS_BACK: "a package is made, for which the model is loaded as a whole",
    REFUSED: "no package is made, and one line says why",
    NOT_MADE: "no tiny model could be made to try it",
    FAILS: "a fault of quantize",
}


TEXT = """# Architectures

transformers has {total} architectures as causal language models or as models of pictures and text. Of {tried} that were
tried, {packaged} are packaged by the recipe rtn: {equal} of them with exactly the tensors that stock transformers and
bitsandbytes write, experts aside, and {calibrated} by the calibrated recipe too. {refused} are refused, {not_made} were
not made so small here, and {fails} show a fault of quantize.

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

    @property
    def whole(self) -> str:
        """Why the model was loaded as a whole, nothing where it was not."""
        ending = ": the model is loaded as a whole"
        return "".join(text.removesuffix(ending) for text in self.texts if text.endswith(ending))


def trial(name: str, place: Path) -> Trial:
    """Make a tiny model of an architecture in the folder `place`, and try everything on it."""
    import torch

    try:
        with torch.inference_mode():
            tiny.build(name)(torch.arange(TOKENS)[None])
        folder = tiny.save(name, place / name)
    except Exception as error:  # noqa: BLE001 - whatever transformers says of sizes that do not fit together
        return Trial(name, NOT_MADE, reason=_said(error))
    notes = Notes()
    try:
        checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
        source_model.check_tensors(checkout)
        model = experts.unstacked(source_model.skeleton(checkout))
        coverage.require(model, RTN, name)
        share, failed = _packaged(checkout, place / "rtn", RTN, notes, model)
    except QuantizeError as error:
        return Trial(name, REFUSED, reason=without_name(str(error), name))
    except Exception as error:  # noqa: BLE001 - a fault, which the page tells
        traceback.print_exc()
        return Trial(name, FAILS, reason=_said(error))
    return Trial(
        name,
        FAILS if failed else FALLS_BACK if notes.whole else WORKS,
        share=share,
        stock=_like_stock(folder, place / "rtn", place / "stock", model),
        calibrated=_calibrated(checkout, place / "calibrated", name, model),
        reason=failed or notes.whole,
    )


def _packaged(checkout: Checkout, output: Path, recipe: Recipe, notes: Notes, source_shape: Any) -> tuple[float, str]:
    """The share in 4 bits of a package that a recipe makes, and what is wrong with it as stock transformers runs it."""
    import torch

    output.mkdir()
    methods.quantize(methods.Job(checkout, output, recipe, "cpu", notes))
    expected = ExpectedConfig.of(recipe)
    model = auto_class(checkout.folder).from_pretrained(
        output, local_files_only=True, trust_remote_code=experts.has_own_code(output)
    )
    checked = [*checks.check_files(output, expected), checks.module_check(source_shape, model, expected)]
    failed = [f"the check {check.name} failed: {check.detail}" for check in checked if not check.passed]
    with torch.inference_mode():
        logits = model.eval()(torch.arange(TOKENS)[None]).logits
    if not bool(logits.isfinite().all()):
        failed.append("its logits are no numbers")
    share = coverage.of(source_shape, modules.names_holding_codes(model, recipe.bits)).quantized
    return share, "; ".join(failed)


def _calibrated(checkout: Checkout, output: Path, name: str, source_shape: Any) -> str:
    """Whether the calibrated recipe makes a package that stock transformers runs."""
    try:
        _, failed = _packaged(checkout, output, CALIBRATED, Notes(), source_shape)
        return f"{FAILS}: {failed}" if failed else YES
    except QuantizeError as error:
        return without_name(str(error), name)
    except Exception as error:  # noqa: BLE001 - a fault, which the page tells
        traceback.print_exc()
        return f"{FAILS}: {_said(error)}"


def _like_stock(folder: Path, package: Path, output: Path, source_shape: Any) -> str:
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
        model = auto_class(folder).from_pretrained(
            folder, quantization_config=asked, dtype=torch.bfloat16, device_map={"": "cpu"}, local_files_only=True
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
    return _difference(ours, theirs, _is_of_experts(source_shape))


def _is_of_experts(source_shape: Any) -> Callable[[str], bool]:
    """Tells which tensors of files are parts of experts, by the source's model whose experts are linear."""
    stacks, paths = experts.stacks(source_shape), [f"{path}." for path, _ in experts.linear_experts(source_shape)]
    rename = source_model.renaming(source_shape, {*source_shape.state_dict(), *stacks})

    def is_of_experts(name: str) -> bool:
        known = rename(name).name
        return known in stacks or known.startswith(tuple(paths)) or ".experts." in name

    return is_of_experts


def _difference(ours: dict[str, Any], theirs: dict[str, Any], is_of_experts: Callable[[str], bool]) -> str:
    """What is otherwise in one of two files; experts that stock leaves in half precision are none of it."""
    import torch

    compared = [name for name in sorted(ours.keys() | theirs.keys()) if not is_of_experts(name)]
    for name in compared:
        if name not in ours or name not in theirs:
            return f"{name} is in {'ours' if name in ours else 'theirs'} alone"
        if (ours[name].dtype, ours[name].shape) != (theirs[name].dtype, theirs[name].shape):
            return f"{name} has another type or shape"
        if not torch.equal(*(held[name].reshape(-1).view(torch.uint8) for held in (ours, theirs))):
            return f"{name} has other bytes"
    return EQUAL if len(compared) == len(theirs) else BESIDES


def _said(error: Exception) -> str:
    """An error in one line."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]


def without_name(text: str, name: str) -> str:
    """A message without the folder and the name of the tiny model, which the table names already."""
    words = [word for word in text.split(" ") if "quantize-architectures-" not in word]
    return " ".join(words).replace(f" {name} ", " this model ").strip(": ")


def page(record: dict[str, Any]) -> str:
    """docs/architectures.md, from what docs/architectures.json holds."""
    trials = [Trial(**row) for row in record["trials"]]
    states = Counter(trial.state for trial in trials)
    packaged = [trial for trial in trials if trial.state in (WORKS, FALLS_BACK)]
    text = TEXT.format(
        total=record["total"],
        tried=len(trials),
        packaged=len(packaged),
        equal=sum(trial.stock in (EQUAL, BESIDES) for trial in packaged),
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
