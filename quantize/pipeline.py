"""What the commands do: a source becomes a package that is quantized, proved and documented."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import model_card
from model_card import CardFacts
from quantize import __version__, devices, files, methods, package, search, source
from quantize.errors import (
    ConfigError,
    CorpusError,
    PackageError,
    QuantizeError,
    UnsupportedModel,
    storage_errors,
)
from quantize.evidence import Evidence
from quantize.folders import write_text
from quantize.formats import experts, source_model
from quantize.formats.bitsandbytes import coverage
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.safetensors import recorded_weight_bytes
from quantize.grades import UNMEASURED
from quantize.package import Package, card
from quantize.parity import check_inputs, corpus_text, figures, measure, picture_problem, unmeasured
from quantize.progress import Progress, Silent
from quantize.records import (
    Checkout,
    Demand,
    EvaluationSettings,
    FileRecord,
    Provenance,
    Publisher,
    Quantized,
    Recipe,
)
from quantize.serialization import now

TOOL = "quantize-bnb"
RTN_NF4 = "NF4 rounded to nearest"
CONTROLS = {"int8": Recipe(name="rtn", bits=8), RTN_NF4: Recipe(name="rtn")}


@dataclass(frozen=True)
class RunRequest:
    """What one `quantize run` was asked for; `output` None means a folder named after the model.

    `name` is what the card calls the package, where not its folder's name. `replace_outdated` replaces a finished
    package of an earlier commit of the same model, as `force` replaces any. `unverified` measures nothing. With
    `clean`, finished parts of a run that was stopped are neither taken up nor left.
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
    clean: bool = False
    unverified: bool = False


@dataclass(frozen=True)
class RunResult:
    """The finished package, and whether this run made it; a package that parity refused has not `passed`."""

    package: Package
    created: bool


@dataclass(frozen=True)
class VerifyRequest:
    """What one `quantize verify` was asked for: `checkpoint` is a folder or a Hub repo, somebody else's as well.

    `against` names the original, required unless the checkpoint is a package whose original is on the Hub.
    """

    checkpoint: str
    against: str | None = None
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    device: str = "auto"
    trust_remote_code: bool = False
    reference_cache: Path | None = None


@dataclass(frozen=True)
class CardRequest:
    """What one `quantize card` was asked for: the package, and what its card shall say otherwise than before.

    `against` is the original's folder where it is not on the Hub, `publisher` None the one on record, `template` a
    Jinja file in place of the built-in one.
    """

    folder: Path
    against: str | None = None
    publisher: Publisher | None = None
    template: Path | None = None


def run(request: RunRequest, progress: Progress) -> RunResult:
    """Fetch, quantize, measure, document and seal; a refused package is kept under a name that shows it.

    Raises QuantizeError, and leaves nothing half done. An unforeseen error of a later attempt is raised after the
    package of the attempts before it is in place.
    """
    request = dataclasses.replace(request, recipe=methods.normalized(request.recipe))
    output = _output(request)
    package.require_replaceable(output)
    device = devices.choose(request.device)
    demand = package.demanded(request.recipe, request.settings)
    with package.staging_folder(output) as staging, package.finished_parts(output, clean=request.clean):
        checkout = _fetch(request, progress)
        finished = _finished(request, demand, checkout, output)
        if finished is not None:
            return RunResult(finished, created=False)
        template = _read_template(request.card_template)
        kept = _undocumented(request, demand, checkout, output)
        with source.watched(checkout):
            bug: Exception | None = None
            if kept is None:
                measured, hashes, bug = _measured(request, demand, checkout, staging, device, progress)
            else:
                measured, hashes = kept, kept.provenance.files
        progress.stage("write card and provenance")
        with _kept_undocumented(measured, hashes, output, progress):
            with source.watched(checkout):
                text = source.card_text(checkout)
                sealed = _document(measured, hashes, text, template, request.card_template)
            result = RunResult(_in_place(sealed, output), created=True)
    if bug is not None:
        raise bug
    return result


def verify(request: VerifyRequest, progress: Progress) -> Evidence:
    """Measure a package against its pinned source, or any bitsandbytes checkpoint against the source named."""
    device = devices.choose(request.device)
    progress.stage(f"checkpoint {request.checkpoint}")
    folder = source.fetch_checkpoint(
        request.checkpoint,
        (files.PROVENANCE, files.PARITY, experts.MODELING),
        progress,
        trust_remote_code=request.trust_remote_code,
    )
    checkout, expected = _original(request, folder, progress)
    progress.stage(f"verify on {device}")
    recipes = CONTROLS if request.settings.controls else {}
    with source.watched(checkout), _controls(checkout, recipes, device, progress) as controls:
        return measure(
            checkout, folder, request.settings, device, progress, expected, controls, request.reference_cache
        )


def draw_figures(evidence: Evidence, folder: Path) -> None:
    """Write the figures of some evidence into a folder."""
    with storage_errors(folder):
        figures.draw(evidence, folder)


def card_names(request: CardRequest) -> dict[str, Any]:
    """Everything that a card's template may name, for one package."""
    return model_card.names(_facts(_opened(request), request.against))


def write_page(opened: Package, path: Path) -> None:
    """A package's card as one HTML file."""
    text = model_card.page((opened.folder / files.CARD).read_text("utf-8"), opened.folder)
    with storage_errors(path):
        write_text(path, text)


def rewrite_card(request: CardRequest) -> Package:
    """Render the card of a package again from its evidence; nothing is measured.

    What a run could not document is documented, and gets the name that the run would have given it.
    """
    opened = _opened(request)
    package.require_unchanged(opened, but=files.CARD)
    name = request.folder.resolve().name
    with storage_errors(request.folder):
        if name.endswith(package.UNDOCUMENTED):
            figures.draw(opened.evidence, request.folder / files.FIGURES)
        rest = tuple(file for file in opened.provenance.files if file.path != files.CARD)
        rendered = rendered_card(opened, request.against, request.template)
        package.write_card(request.folder, rendered.text)
        sealed = dataclasses.replace(opened, provenance=package.seal(request.folder, rendered.provenance, rest))
        if name.endswith(package.UNDOCUMENTED):
            return _in_place(sealed, request.folder.resolve().with_name(name.removesuffix(package.UNDOCUMENTED)))
    return sealed


@dataclass(frozen=True)
class RenderedCard:
    """A package's card, and the package's record with it."""

    text: str
    provenance: Provenance


def rendered_card(opened: Package, against: str | None, template: Path | None) -> RenderedCard:
    """A package's card as it would be written now."""
    source_text = _source_card(opened.provenance, against)
    provenance = dataclasses.replace(
        _with_template(opened.provenance, _read_template(template)), source_card=source_text
    )
    facts = _facts(Package(opened.folder, provenance, opened.evidence), None)
    return RenderedCard(_rendered(facts, _read_template(template), template), provenance)


def default_output(model: str, recipe: Recipe) -> Path:
    """`distilgpt2-bnb-4bit` in the current folder, for `distilbert/distilgpt2`."""
    return Path(f"{source.name_of(model)}-bnb-{recipe.bits}bit")


def _output(request: RunRequest) -> Path:
    return request.output or default_output(request.model, request.recipe)


def _fetch(request: RunRequest, progress: Progress) -> Checkout:
    progress.stage(f"source {request.model}")
    return source.fetch(
        request.model,
        revision=request.revision,
        trust_remote_code=request.trust_remote_code,
        progress=progress,
    )


def _finished(request: RunRequest, demand: Demand, checkout: Checkout, output: Path) -> Package | None:
    """The package that an earlier run left at `output`, where it answers this request."""
    if request.force:
        return None
    finished = package.finished(output, checkout.source, demand, outdated=request.replace_outdated)
    if finished is None or request.unverified or finished.evidence.verdict.grade != UNMEASURED:
        return finished
    return None


def _undocumented(request: RunRequest, demand: Demand, checkout: Checkout, output: Path) -> Package | None:
    """What an earlier run made and measured for this request, but could not document."""
    folder = package.undocumented_folder(output)
    measured = package.undocumented(folder, checkout.source, demand)
    if measured is None or request.force:
        return None
    name, provenance = request.name or output.name, measured.provenance
    return dataclasses.replace(
        measured, provenance=dataclasses.replace(provenance, name=name, publisher=request.publisher)
    )


def _measured(
    request: RunRequest, demand: Demand, checkout: Checkout, staging: Path, device: str, progress: Progress
) -> tuple[Package, tuple[FileRecord, ...], Exception | None]:
    """What is made and measured in `staging`, to be documented; its files as they were before measuring; and the
    unforeseen error that ended the search after that."""
    _check(request, checkout, staging, progress)
    output = _output(request)
    resume, corpus = output.with_name(f"{output.name}{package.UNFINISHED}"), corpus_text(request.settings)
    job = methods.Job(checkout, staging, request.recipe, device, progress, corpus, resume)
    candidate = _without_paths(search.build(job, request.settings, _measurement(request, job)))
    _require_same_texts(request, demand)
    package.write_evidence(staging, candidate.evidence)
    provenance = _provenance(request, demand, checkout, candidate, output.name)
    return Package(staging, provenance, candidate.evidence), candidate.files, candidate.bug


def _check(request: RunRequest, checkout: Checkout, staging: Path, progress: Progress) -> None:
    """Raise now what would otherwise end the run after hours: license, tensors, corpus, recipe, disk."""
    _check_metadata(checkout, request.allow_no_derivatives, progress)
    unused = source_model.grouped(source_model.check_tensors(checkout))
    if unused:
        progress.note(f"the model has no place for these tensors in its files: {', '.join(unused)}")
    coverage.require(experts.unstacked(source_model.skeleton(checkout)), request.recipe, checkout.source.name)
    check_inputs(checkout, request.settings)
    if reason := picture_problem(checkout):
        progress.note(f"only text will be measured, no pictures: {reason}")
    methods.check(checkout, request.recipe, corpus_text(request.settings))
    files.require_space(staging, recorded_weight_bytes(checkout.source.files), "the package")


def _measurement(request: RunRequest, job: methods.Job) -> search.Measure:
    """How a run measures its candidates: beside the method that a recipe improves on, where that was asked for."""

    def measurement(
        folder: Path, recipe: Recipe, quantized: Quantized, settings: EvaluationSettings, attempts: int
    ) -> Evidence:
        checkout, expected = job.checkout, ExpectedConfig.of(recipe, quantized.half_precision_modules)
        if request.unverified:
            job.progress.stage("check the files; nothing is measured")
            return unmeasured(checkout, folder, settings, job.device, expected)
        job.progress.stage("verify against the original")
        baseline = methods.get(recipe.name).improves_on if recipe.name == request.recipe.name else None
        recipes = {
            name: control
            for name, control in CONTROLS.items()
            if settings.controls or (control.name, control.bits) == (baseline, recipe.bits)
        }
        cache, progress = request.reference_cache, job.progress
        with _controls(checkout, recipes, job.device, progress) as controls:
            return measure(checkout, folder, settings, job.device, progress, expected, controls, cache, attempts)

    return measurement


@contextmanager
def _controls(
    checkout: Checkout, recipes: Mapping[str, Recipe], device: str, progress: Progress
) -> Iterator[dict[str, Path | str]]:
    """Folders with other quantizations of the source by their names, deleted after the measurement.

    In place of one that could not be made stands why; a run does not end for want of a comparison.
    """
    with tempfile.TemporaryDirectory(prefix="quantize-controls-") as parent:
        controls: dict[str, Path | str] = {}
        for name, recipe in recipes.items():
            progress.note(f"making the control {name}")
            folder = Path(parent) / name
            folder.mkdir()
            try:
                with storage_errors(folder):
                    methods.quantize(methods.Job(checkout, folder, recipe, device, Silent()))
                controls[name] = folder
            except QuantizeError as error:
                controls[name] = f"could not be made: {error}"
        yield controls


def _original(request: VerifyRequest, folder: Path, progress: Progress) -> tuple[Checkout, ExpectedConfig | None]:
    """What a checkpoint is measured against, and for a package the config that its recipe promises."""
    against, trust = request.against, request.trust_remote_code
    if (folder / files.PROVENANCE).is_file():
        provenance = package.open_package(folder).provenance
        checkout = source.refetch(provenance.source, against, trust_remote_code=trust, progress=progress)
        return checkout, ExpectedConfig.of(provenance.recipe, provenance.quantized.half_precision_modules)
    if not (folder / files.CONFIG).is_file():
        raise PackageError(f"{request.checkpoint} holds no model: it has no {files.CONFIG}")
    if against is None:
        raise PackageError(f"{request.checkpoint} has no {files.PROVENANCE}: name its original model with --against")
    return source.fetch(against, revision=None, trust_remote_code=trust, progress=progress), None


def _without_paths(candidate: search.Candidate) -> search.Candidate:
    """The candidate with texts named as records name them, in its recipe and in those of all attempts."""
    attempts = tuple(
        dataclasses.replace(attempt, recipe=package.without_paths(attempt.recipe))
        for attempt in candidate.evidence.attempts
    )
    evidence = dataclasses.replace(candidate.evidence, attempts=attempts)
    return dataclasses.replace(candidate, recipe=package.without_paths(candidate.recipe), evidence=evidence)


def _require_same_texts(request: RunRequest, demand: Demand) -> None:
    """Raise CorpusError where a text of the user's own is another than it was when the run began."""
    if package.demanded(request.recipe, request.settings).texts != demand.texts:
        raise CorpusError(
            f"a text of {request.model}'s run was changed while it was in use: run the same command again"
        )


def _provenance(
    request: RunRequest, demand: Demand, checkout: Checkout, candidate: search.Candidate, name: str
) -> Provenance:
    """The record of a run, before its files are hashed."""
    return Provenance(
        tool=TOOL,
        tool_version=__version__,
        created=now(),
        source=checkout.source,
        recipe=candidate.recipe,
        quantized=candidate.quantized,
        settings=demand.settings,
        environment=candidate.evidence.environment,
        publisher=request.publisher,
        name=request.name or name,
        key=demand.key(checkout.source.repo_id or checkout.source.name, checkout.source.pinned),
        requested=None if candidate.recipe == demand.recipe else demand.recipe,
        texts=dict(demand.texts),
        source_card=source.card_text(checkout),
    )


def _document(
    measured: Package, hashes: tuple[FileRecord, ...], source_card: str | None, template: str | None, path: Path | None
) -> Package:
    """Write figures and card beside weights and evidence, and seal all with hashes; `path` is the template's."""
    folder = measured.folder
    provenance = _with_template(measured.provenance, template)
    provenance = dataclasses.replace(provenance, source_card=source_card, files=hashes or provenance.files)
    figures.draw(measured.evidence, folder / files.FIGURES)
    facts = card.facts(provenance, measured.evidence, source_card, card.figure_names(folder))
    package.write_card(folder, _rendered(facts, template, path))
    return dataclasses.replace(measured, provenance=package.seal(folder, provenance, hashes))


@contextmanager
def _kept_undocumented(
    measured: Package, hashes: tuple[FileRecord, ...], output: Path, progress: Progress
) -> Iterator[None]:
    """Keep what was made and measured when documenting it fails, and say where."""
    try:
        with storage_errors(measured.folder):
            yield
    except Exception as error:
        try:
            package.seal_undocumented(measured.folder, measured.provenance, hashes)
            kept = package.keep_undocumented(measured.folder, output)
        except (OSError, QuantizeError):
            raise error from None
        line = f"the measured package is kept in {kept}: run the same command again, or `quantize card {kept}`"
        if isinstance(error, QuantizeError):
            raise type(error)(f"{error}; {line}") from error
        progress.note(line)
        raise


def _in_place(sealed: Package, output: Path) -> Package:
    """A sealed package under its final name."""
    verdict = sealed.evidence.verdict
    sound = verdict.passed or verdict.grade == UNMEASURED
    return dataclasses.replace(sealed, folder=package.move_into_place(sealed.folder, output, passed=sound))


def _opened(request: CardRequest) -> Package:
    """The package that a card is rendered for, under the publisher's name that is given."""
    opened = package.open_package(request.folder)
    if request.publisher is None:
        return opened
    return dataclasses.replace(opened, provenance=dataclasses.replace(opened.provenance, publisher=request.publisher))


def _facts(opened: Package, against: str | None) -> CardFacts:
    """What the card of a package is made from: its evidence, and its source's own card."""
    text = _source_card(opened.provenance, against)
    name = opened.provenance.name or opened.folder.resolve().name
    provenance = dataclasses.replace(opened.provenance, name=name)
    return card.facts(provenance, opened.evidence, text, card.figure_names(opened.folder))


def _source_card(provenance: Provenance, against: str | None) -> str | None:
    """The recorded card of a package's source, or the one that `against` or the Hub has."""
    if against is None and provenance.source_card is not None:
        return provenance.source_card
    return source.read_card(provenance.source, against)


def _with_template(provenance: Provenance, template: str | None) -> Provenance:
    """The record of a package whose card is rendered from this template."""
    digest = None if template is None else hashlib.sha256(template.encode()).hexdigest()
    return dataclasses.replace(provenance, card_template=digest)


def _check_metadata(checkout: Checkout, allowed: bool, progress: Progress) -> None:
    """Say what the card will not inherit as it stands; raises UnsupportedModel for a license against changed copies."""
    original = model_card.split(source.card_text(checkout) or "")
    license_name = model_card.forbids_derivatives(original)
    if license_name and not allowed:
        raise UnsupportedModel(
            f"{checkout.source.name} has the license {license_name}, which allows no changed copies: ask its authors, "
            f"and then say --allow-no-derivatives"
        )
    for note in model_card.inherited(original)[1]:
        progress.note(note)


def _read_template(path: Path | None) -> str | None:
    """The text of a template that can be parsed; what it names is known only when there are facts."""
    if path is None:
        return None
    try:
        template = path.read_text("utf-8")
        model_card.parse(template)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--card-template {path} cannot be read: {error}") from error
    except model_card.TemplateProblem as problem:
        raise ConfigError(f"--card-template {path}: {problem}") from None
    return template


def _rendered(facts: CardFacts, template: str | None, path: Path | None) -> str:
    try:
        return model_card.render(facts, template)
    except model_card.TemplateProblem as problem:
        raise ConfigError(
            f"--card-template {path}: {problem}; `quantize card --facts` lists what it may name"
        ) from None
