"""What the commands do: a source becomes a package that is quantized, proved, documented and published."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_card
from model_card import CardFacts
from quantize import __version__, devices, files, methods, package, search, source
from quantize.errors import ConfigError, PackageError, UnsupportedModel, storage_errors
from quantize.evidence import Evidence
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.safetensors import recorded_weight_bytes
from quantize.grades import UNMEASURED
from quantize.package import Package, card
from quantize.parity import check_inputs, corpus_text, figures, measure, unmeasured
from quantize.progress import Progress, Silent
from quantize.records import (
    Checkout,
    EvaluationSettings,
    Provenance,
    Publisher,
    Quantized,
    Recipe,
    package_key,
)
from quantize.serialization import now

TOOL = "quantize-bnb"
STOCK_NF4 = "stock NF4"
CONTROLS = {"int8": Recipe(name="rtn", bits=8), STOCK_NF4: Recipe(name="rtn")}


@dataclass(frozen=True)
class RunRequest:
    """What one `quantize run` was asked for; `output` None means a folder named after the model.

    `name` is what the card calls the package, where not its folder's name. `replace_outdated` replaces a finished
    package of an earlier commit of the same model, as `force` replaces any. `unverified` measures nothing.
    """

    model: str
    revision: str | None = None
    output: Path | None = None
    recipe: Recipe = field(default_factory=Recipe)
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    device: str = "auto"
    trust_remote_code: bool = False
    force: bool = False
    reference_cache: Path | None = None
    publisher: Publisher | None = None
    card_template: Path | None = None
    allow_no_derivatives: bool = False
    name: str = ""
    replace_outdated: bool = False
    unverified: bool = False


@dataclass(frozen=True)
class RunResult:
    """The finished package, and whether this run made it."""

    package: Package
    created: bool


def run(request: RunRequest, progress: Progress) -> RunResult:
    """Fetch, quantize, measure, document and seal; a refused package is kept under a name that shows it."""
    request = dataclasses.replace(request, recipe=methods.normalized(request.recipe))
    output = request.output or default_output(request.model, request.recipe)
    package.require_replaceable(output)
    device = devices.choose(request.device)
    with package.staging_folder(output) as staging:
        progress.stage(f"source {request.model}")
        checkout = source.fetch(
            request.model,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
            progress=progress,
        )
        if not request.force:
            done = package.finished(
                output, checkout.source, request.recipe, request.settings, outdated=request.replace_outdated
            )
            if done and (request.unverified or done.evidence.verdict.grade != UNMEASURED):
                return RunResult(done, created=False)
        _require_derivable(checkout, request.allow_no_derivatives)
        template = _read_template(request.card_template)
        check_inputs(checkout, request.settings)
        methods.check(checkout, request.recipe, corpus_text(request.settings))
        files.require_space(staging, recorded_weight_bytes(checkout.source.files), "the package")
        resume = output.with_name(f"{output.name}{package.UNFINISHED}")
        judge = _judge(request, checkout, device, progress)
        made = search.build(checkout, staging, request.recipe, request.settings, device, progress, resume, judge)
        evidence = made.evidence
        progress.stage("write card and provenance")
        provenance = Provenance(
            tool=TOOL,
            tool_version=__version__,
            created=now(),
            source=checkout.source,
            recipe=made.recipe,
            quantized=made.quantized,
            settings=request.settings,
            environment=evidence.environment,
            publisher=request.publisher,
            name=request.name or output.name,
            key=package_key(checkout.source.repo_id or checkout.source.name, checkout.source.pinned, request.recipe),
            requested=None if made.recipe == request.recipe else request.recipe,
        )
        package.write_evidence(staging, evidence)
        figures.draw(evidence, staging / files.FIGURES)
        facts = card.facts(provenance, evidence, source.card_text(checkout), card.figure_names(staging))
        package.write_card(staging, _rendered(facts, template, request.card_template))
        provenance = package.seal(staging, provenance)
        sound = evidence.verdict.passed or evidence.verdict.grade == UNMEASURED
        final = package.move_into_place(staging, output, passed=sound)
    return RunResult(Package(final, provenance, evidence), created=True)


def verify(
    reference: str,
    against: str | None,
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
    trust_remote_code: bool = False,
    reference_cache: Path | None = None,
) -> Evidence:
    """Measure a package against its pinned source, or any bitsandbytes checkpoint against the source named.

    `reference` is a folder or a Hub repo, somebody else's as well.
    """
    chosen = devices.choose(device)
    progress.stage(f"checkpoint {reference}")
    folder = source.fetch_checkpoint(reference, (files.PROVENANCE, files.PARITY), progress)
    if (folder / files.PROVENANCE).is_file():
        provenance = package.open_package(folder).provenance
        checkout = source.refetch(provenance.source, against, trust_remote_code=trust_remote_code, progress=progress)
        expected = ExpectedConfig.of(provenance.recipe, provenance.quantized.half_precision_modules)
    elif not (folder / files.CONFIG).is_file():
        raise PackageError(f"{reference} holds no model: it has no {files.CONFIG}")
    elif against is None:
        raise PackageError(f"{reference} has no {files.PROVENANCE}: name its original model with --against")
    else:
        checkout = source.fetch(against, revision=None, trust_remote_code=trust_remote_code, progress=progress)
        expected = None
    progress.stage(f"verify on {chosen}")
    with _controls(checkout, CONTROLS if settings.controls else {}, chosen, progress) as controls:
        return measure(checkout, folder, settings, chosen, progress, expected, controls, reference_cache)


def draw_figures(evidence: Evidence, folder: Path) -> None:
    """Write the figures of some evidence into a folder."""
    with storage_errors(folder):
        figures.draw(evidence, folder)


def card_names(folder: Path, against: str | None, publisher: Publisher | None = None) -> dict[str, Any]:
    """Everything that a card's template may name, for one package."""
    return model_card.names(_facts(_published_by(package.open_package(folder), publisher), against))


def write_page(made: Package, path: Path) -> None:
    """A package's card as one HTML file."""
    text = model_card.page((made.folder / files.CARD).read_text("utf-8"), made.folder)
    with storage_errors(path):
        path.write_text(text, "utf-8")


def rewrite_card(
    folder: Path, against: str | None, publisher: Publisher | None = None, card_template: Path | None = None
) -> Package:
    """Render the card of a package again from its evidence; nothing is measured."""
    made = _published_by(package.open_package(folder), publisher)
    package.require_unchanged(made, but=files.CARD)
    text = rendered_card(made, against, card_template)
    with storage_errors(folder):
        package.write_card(folder, text)
        return Package(folder, package.seal(folder, made.provenance), made.evidence)


def rendered_card(made: Package, against: str | None, card_template: Path | None) -> str:
    """The text of a package's card as it would be written now."""
    return _rendered(_facts(made, against), _read_template(card_template), card_template)


def default_output(model: str, recipe: Recipe) -> Path:
    """`distilgpt2-bnb-4bit` in the current folder, for `distilbert/distilgpt2`."""
    return Path(f"{source.name_of(model)}-bnb-{recipe.bits}bit")


def _judge(request: RunRequest, checkout: Checkout, device: str, progress: Progress) -> search.Measure:
    """How a run measures what it made: a calibrated package always beside what stock would have given."""

    def judge(folder: Path, recipe: Recipe, quantized: Quantized, settings: EvaluationSettings) -> Evidence:
        expected = ExpectedConfig.of(recipe, quantized.half_precision_modules)
        if request.unverified:
            return unmeasured(checkout, folder, settings, device, expected)
        wanted = CONTROLS if settings.controls else {}
        if methods.get(recipe.name).improves_on == "rtn" and request.recipe.name == recipe.name:
            wanted = {STOCK_NF4: CONTROLS[STOCK_NF4], **wanted}
        with _controls(checkout, wanted, device, progress) as controls:
            return measure(checkout, folder, settings, device, progress, expected, controls, request.reference_cache)

    return judge


@contextmanager
def _controls(
    checkout: Checkout, wanted: Mapping[str, Recipe], device: str, progress: Progress
) -> Iterator[dict[str, Path]]:
    """Folders of the alternatives `wanted`, made for the measurement and gone after it."""
    with tempfile.TemporaryDirectory(prefix="quantize-controls-") as place:
        folders = {name: Path(place) / name for name in wanted}
        for name, folder in folders.items():
            progress.note(f"making the control {name}")
            folder.mkdir()
            with storage_errors(folder):
                methods.quantize(methods.Job(checkout, folder, wanted[name], device, Silent()))
        yield folders


def _published_by(made: Package, publisher: Publisher | None) -> Package:
    """The package under another publisher's name, where one is given."""
    if publisher is None:
        return made
    return dataclasses.replace(made, provenance=dataclasses.replace(made.provenance, publisher=publisher))


def _facts(made: Package, against: str | None) -> CardFacts:
    """What the card of a package is made from: its evidence, and its source's own card."""
    text = source.read_card(made.provenance.source, against)
    named = dataclasses.replace(made.provenance, name=made.provenance.name or made.folder.resolve().name)
    return card.facts(named, made.evidence, text, card.figure_names(made.folder))


def _require_derivable(checkout: Checkout, allowed: bool) -> None:
    """Raise UnsupportedModel where the source's license lets nobody publish changed copies."""
    metadata = model_card.split(source.card_text(checkout) or "").metadata
    license_name = model_card.forbids_derivatives(metadata)
    if license_name and not allowed:
        raise UnsupportedModel(
            f"{checkout.source.name} has the license {license_name}, which allows no changed copies: ask its authors, "
            f"and then say --allow-no-derivatives"
        )


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--card-template {path} cannot be read: {error}") from error


def _rendered(facts: CardFacts, template: str | None, path: Path | None) -> str:
    try:
        return model_card.render(facts, template)
    except model_card.TemplateProblem as problem:
        raise ConfigError(
            f"--card-template {path}: {problem}; `quantize card --facts` lists what it may name"
        ) from None
