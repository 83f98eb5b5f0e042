"""The proof by download: what was published is fetched again, hashed, and run."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from quantize import devices, hub
from quantize.errors import PublishError
from quantize.evidence import Evidence
from quantize.files import PARITY, hash_file, require_space
from quantize.parity import sample_loss
from quantize.progress import Progress
from quantize.publishing.records import Downloaded
from quantize.records import FileRecord, Provenance
from quantize.serialization import read_record

SAME_LOSS = 1e-3
"""Nats a token by which the model from the Hub may differ from the local one: noise of the kernels."""


def check_download(
    repo_id: str,
    commit: str,
    files: tuple[FileRecord, ...],
    provenance: Provenance,
    local: Path | None,
    device: str,
    progress: Progress,
) -> Downloaded:
    """Fetch what was published into an empty cache, hash it, and let stock transformers load and run it.

    Raises PublishError where something differs, or where the model computes something else than the `local` package.
    """
    started, size = time.monotonic(), sum(file.size for file in files)
    device, trust = devices.choose(device), provenance.source.remote_code
    progress.note(f"fetching {size / 1e6:.1f} MB again from {repo_id}")
    with tempfile.TemporaryDirectory(prefix="quantize-download-") as temporary:
        cache = Path(temporary)
        require_space(cache, size, f"downloading {repo_id}")
        folder = hub.download(repo_id, commit, [file.path for file in files], cache)
        for file in files:
            path = folder / file.path
            if not path.is_file() or hash_file(path) != (file.size, file.sha256):
                raise PublishError(f"{file.path} comes back from {repo_id} with other content: push again with --force")
        generation = read_record(Evidence, folder / PARITY).generation
        texts = [sample.prompt + sample.reference_greedy for sample in generation.samples] if generation else []
        tokens, loss = sample_loss(folder, texts, device, trust)
    expected = sample_loss(local, texts, device, trust)[1] if local else None
    if not abs(loss - (loss if expected is None else expected)) <= SAME_LOSS:
        raise PublishError(
            f"the model from {repo_id} computes something else ({loss:.4f} nats a token instead of {expected}): "
            f"look at the repo before anybody uses it"
        )
    return Downloaded(len(files), size, tokens, loss, expected, round(time.monotonic() - started, 3))
