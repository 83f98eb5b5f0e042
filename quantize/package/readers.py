"""The least versions that read a package."""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantize.records import Quantized, Source

OLDEST_TRIED = {"transformers": "4.57", "accelerate": "1.10", "bitsandbytes": "0.48"}
"""With these scripts/consumers loads packages, see docs/consumers.md."""
RELEASE = re.compile(r"\d+(\.\d+){1,2}")


def least_versions(
    source: Source, quantized: Quantized, versions: Mapping[str, str], *, own_code: bool = False
) -> dict[str, str]:
    """The least versions by library; `versions` are those that the package was made with.

    A config.json is read by the version that wrote it, whatever the model, and from then on. Blocks of 32 weights are
    newer than the format. Experts are loaded by code that was tried with no other transformers.
    """
    written_by = RELEASE.match(source.transformers_version) or RELEASE.match(versions["transformers"])
    least = dict(OLDEST_TRIED)
    if written_by and _numbers(written_by[0]) > _numbers(least["transformers"]):
        least["transformers"] = written_by[0]
    if own_code:
        least["transformers"] = versions["transformers"]
    if quantized.block_32_modules:
        least["bitsandbytes"] = versions["bitsandbytes"]
    return least


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
