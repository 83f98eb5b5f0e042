"""Before a package is published, it is asked whether its files, its records and its card say the same."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from quantize import __version__, package, pipeline
from quantize.documents import read_json
from quantize.errors import PackageError, ParityRefused
from quantize.evidence import Evidence
from quantize.files import CARD, CONFIG, PARITY, PROVENANCE
from quantize.formats import experts, remote_code
from quantize.formats.bitsandbytes import recount
from quantize.formats.model_class import reads_pictures
from quantize.formats.safetensors import recorded_weight_bytes, weight_bytes
from quantize.package import Package
from quantize.parity import consistency
from quantize.records import Provenance, Source

HOST = re.compile(r"https?://[^\s/)\]]+")
"""The Hub's address on a card may be another than that of the machine that publishes."""
END_OF_MATTER = "\n---\n"


def require_sound(sealed: Package) -> None:
    """Raise unless a package passed and nothing in it contradicts anything else.

    ParityRefused: its verdict says that it did not pass. PackageError: it was made before windows' figures were
    recorded, it was changed since it was sealed, or it contradicts itself.
    """
    evidence = sealed.evidence
    package.require_unchanged(sealed)
    if not evidence.verdict.passed:
        raise ParityRefused(f"{sealed.folder} did not pass parity ({evidence.verdict.grade}): it is not published")
    if evidence.scores is not None and evidence.look_plan is None:
        raise PackageError(
            f"{sealed.folder} was made before figures of single windows were recorded, so nobody can judge it again: "
            f"measure it again with `quantize run --force`"
        )
    try:
        found = next(_contradictions(sealed), None)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # values that none could have
        found = f"its records hold values that cannot be ({type(error).__name__}: {error})"
    if found is not None:
        raise PackageError(
            f"{sealed.folder} is not published, since it contradicts itself: {found}; make it again with "
            f"`quantize run --force`"
        )


def _contradictions(sealed: Package) -> Iterator[str]:
    """Where the files of a package contradict each other, one sentence each."""
    evidence, provenance = sealed.evidence, sealed.provenance
    parameters = evidence.sizes.parameters
    parts = {
        PARITY: (
            consistency.contradictions(evidence, provenance.recipe, provenance.settings),
            _sizes(sealed),
            _senses(sealed),
        ),
        PROVENANCE: (
            _records(provenance, evidence),
            _code(sealed),
            recount.contradictions(
                sealed.folder, provenance.recipe, provenance.quantized, parameters, evidence.coverage
            ),
        ),
        CARD: (_card(sealed),),
    }
    for file, sentences in parts.items():
        for sentence in itertools.chain(*sentences):
            yield f"{file}: {sentence}"


def _sizes(sealed: Package) -> Iterator[str]:
    sizes = sealed.evidence.sizes
    held, original = weight_bytes(sealed.folder), recorded_weight_bytes(sealed.provenance.source.files)
    if (sizes.package_bytes, sizes.source_bytes) != (held, original):
        yield f"it says {sizes.package_bytes:,} of {sizes.source_bytes:,} bytes, and {held:,} of {original:,} are there"
    if abs(sizes.bits_per_parameter - 8 * held / sizes.parameters) > 1e-3:
        yield f"{held:,} bytes for {sizes.parameters:,} parameters are not {sizes.bits_per_parameter} bits each"


def _senses(sealed: Package) -> Iterator[str]:
    if sealed.evidence.reads_pictures != reads_pictures(read_json(sealed.folder / CONFIG, CONFIG, PackageError)):
        yield f"by its {CONFIG} the model reads pictures, or reads none, and its evidence says otherwise"


def _records(provenance: Provenance, evidence: Evidence) -> Iterator[str]:
    """What both records say, and what one of them says twice."""
    source, quantized = provenance.source, provenance.quantized
    if provenance.environment != evidence.environment:
        yield "the two records name different environments"
    if provenance.key != provenance.demand.key(source.repo_id or source.name, source.pinned):
        yield "the key is not that of its source, recipe and settings"
    if set(evidence.weight_errors) != set(quantized.modules):
        yield "other modules are recorded as quantized than were compared with the original"
    if evidence.attempts and provenance.requested is None:
        yield "several recipes were tried, and none is said to have been asked for"
    if not _is_recorded(source, provenance.source_card):
        yield f"the original's {CARD} is not the one that was recorded"


def _code(sealed: Package) -> Iterator[str]:
    """Code that is neither the original's, where that was allowed, nor the package's own."""
    source = sealed.provenance.source
    known = {experts.own_record(), *(source.files if source.remote_code else ())}
    for file in sealed.provenance.files:
        if file.path.endswith(".py") and file not in known:
            yield f"{file.path} is code neither of the original nor of this version of quantize"
    foreign = remote_code.classes(sealed.folder) - experts.own_classes(sealed.folder)
    if foreign and not source.remote_code:
        yield f"{CONFIG} names {min(foreign)}, and nobody allowed that code"


def _is_recorded(source: Source, text: str | None) -> bool:
    recorded = next((file.sha256 for file in source.files if file.path == CARD), None)
    if recorded is None or text is None:
        return recorded is None and text is None
    return recorded in {hashlib.sha256(mark + text.encode()).hexdigest() for mark in (b"", b"\xef\xbb\xbf")}


def _card(sealed: Package) -> Iterator[str]:
    """Whether the card says what these records give.

    The text that a template of the publisher's makes is not known here, nor is the wording of other versions, whose
    cards are rendered again before they are published.
    """
    provenance = sealed.provenance
    if provenance.tool_version != __version__:
        return
    now = HOST.sub("", pipeline.rendered_card(sealed, None, None).text)
    then = HOST.sub("", card_on_disk(sealed.folder))
    if provenance.card_template is not None:
        now, then = front_matter(now), front_matter(then)
    if now != then:
        known = set(now.splitlines())
        line = next((text for text in then.splitlines() if text not in known), "a line is missing")
        yield f"it does not follow from the evidence: {line[:80]!r}"


def card_on_disk(folder: Path) -> str:
    """The card as its bytes are, line ends of the original's text included."""
    return (folder / CARD).read_bytes().decode("utf-8")


def front_matter(card: str) -> str:
    """The metadata of a card of ours, between its marks."""
    return card[: card.index(END_OF_MATTER, 1) + len(END_OF_MATTER)]
