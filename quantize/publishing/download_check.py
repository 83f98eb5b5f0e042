"""The proof by download: what was published is fetched again, hashed, run, and measured again in part."""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from pathlib import Path

from quantize import devices, hub, source
from quantize.errors import CorpusError, PublishError, SourceError
from quantize.evidence import Evidence
from quantize.files import PARITY, hash_file, require_space
from quantize.formats import experts
from quantize.parity import differs, figures_again, sample_loss
from quantize.progress import Progress
from quantize.publishing.records import Downloaded, Verification
from quantize.records import FileRecord, Provenance
from quantize.serialization import read_record

SAME_LOSS = 1e-3
"""Nats a token by which the model from the Hub may differ from the local one: noise of the kernels."""
SAMPLE = 4
"""Windows that are scored again."""


def check_download(
    repo_id: str,
    commit: str,
    files: tuple[FileRecord, ...],
    provenance: Provenance,
    local: Path | None,
    verification: Verification,
    progress: Progress,
) -> Downloaded:
    """Fetch what was published into an empty cache, hash it, let stock transformers run it, and score windows again.

    Raises PublishError where something differs, or where the model computes something else than the `local` package
    or than its evidence says.
    """
    started, size = time.monotonic(), sum(file.size for file in files)
    device = devices.choose(verification.device)
    progress.note(f"fetching {size / 1e6:.1f} MB again from {repo_id}")
    with tempfile.TemporaryDirectory(prefix="quantize-download-") as temporary:
        cache = Path(temporary)
        require_space(cache, size, f"downloading {repo_id}")
        folder = hub.download(repo_id, commit, [file.path for file in files], cache)
        _require_same(repo_id, folder, files)
        trust = provenance.source.remote_code or experts.names_only_own_code(folder)
        evidence = read_record(Evidence, folder / PARITY)
        samples = evidence.generation.samples if evidence.generation else ()
        texts = [sample.prompt + sample.reference_greedy for sample in samples]
        tokens, loss = sample_loss(folder, texts, device, trust)
        windows = _measured_again(repo_id, folder, provenance, evidence, device, verification, progress)
    expected = sample_loss(local, texts, device, trust)[1] if local else None
    if not abs(loss - (loss if expected is None else expected)) <= SAME_LOSS:
        raise PublishError(
            f"the model from {repo_id} computes something else ({loss:.4f} nats a token instead of {expected}): "
            f"look at the repo before anybody uses it"
        )
    return Downloaded(len(files), size, tokens, loss, expected, round(time.monotonic() - started, 3), windows)


def _require_same(repo_id: str, folder: Path, files: tuple[FileRecord, ...]) -> None:
    for file in files:
        path = folder / file.path
        if not path.is_file() or hash_file(path) != (file.size, file.sha256):
            raise PublishError(f"{file.path} comes back from {repo_id} with other content: publish it again")


def _measured_again(
    repo_id: str,
    folder: Path,
    provenance: Provenance,
    evidence: Evidence,
    device: str,
    verification: Verification,
    progress: Progress,
) -> int:
    """How many of the recorded windows gave the recorded figures again; raises PublishError where one did not.

    None where the text or the original is not at hand, which is said.
    """
    scores, record, settings = evidence.scores, evidence.corpus, provenance.settings
    if scores is None or record is None or not scores.window_figures.kld:
        progress.note("not measured again: the evidence has no figures of single windows")
        return 0
    if "corpus" in provenance.texts and verification.corpus:
        settings = dataclasses.replace(settings, corpus=verification.corpus)
    figures = scores.window_figures
    indices = sorted(random.SystemRandom().sample(range(len(figures.kld)), min(SAMPLE, len(figures.kld))))
    try:
        checkout = source.refetch(
            provenance.source, verification.against, trust_remote_code=provenance.source.remote_code, progress=progress
        )
        again = figures_again(checkout, folder, settings, record, indices, device, progress)
    except (CorpusError, SourceError) as error:
        progress.note(f"not measured again: {error}")
        return 0
    for place, index in enumerate(indices):
        for name in ("kld", "nll_difference"):
            recorded, measured = getattr(figures, name)[index], getattr(again, name)[place]
            if differs(recorded, measured):
                raise PublishError(
                    f"the model from {repo_id} is not the one that was measured: {name} of window {index} is "
                    f"{measured:.4f} and was recorded as {recorded:.4f}; delete it there, and make it again with "
                    f"`quantize run --force`"
                )
    return len(indices)
