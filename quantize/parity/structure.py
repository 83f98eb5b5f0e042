"""Is the package what its recipe says? What is no matter of the format: code, ties, arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.evidence import Check
from quantize.formats import experts, remote_code
from quantize.formats.bitsandbytes import checks
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.formats.ties import is_tied
from quantize.records import Checkout

ARITHMETIC_LIMIT = 0.001
"""Mean KLD in nats, a sixth of what the grade lossless allows."""
NOISE_FACTOR = 3.0
"""Times the shift of the original, from which that of a package may differ by chance and by kernels."""


def trusts(checkout: Checkout, candidate: Path) -> bool:
    """Whether code that the candidate brings may run: the package's own, or the source's where that was trusted."""
    own = experts.names_only_own_code(candidate)
    return (checkout.source.remote_code or own) and same_code(checkout, candidate)


def same_code(checkout: Checkout, candidate: Path) -> bool:
    """Whether the candidate brings and names no other code than the source's, which alone was trusted, and our own."""
    own = f"{checkout.source.repo_id}--"
    named = {name.removeprefix(own) for name in remote_code.classes(candidate)}
    known = remote_code.classes(checkout.folder) | experts.own_classes(candidate)
    return named <= known and all(_is_known(path, candidate, checkout.folder) for path in candidate.rglob("*.py"))


def _is_known(path: Path, candidate: Path, source: Path) -> bool:
    """Whether a file of code is the source's at the same place, or the package's own."""
    name = path.relative_to(candidate)
    if (source / name).is_file() and (source / name).read_bytes() == path.read_bytes():
        return True
    return str(name) == experts.MODELING and experts.has_own_code(candidate)


def check_models(reference: Any, candidate: Any, folder: Path, expected: ExpectedConfig) -> list[Check]:
    """What the reloaded model shows: modules, ties, size."""
    return [
        checks.module_check(reference, candidate, expected),
        tie_check(reference, candidate),
        checks.size_check(reference, candidate, folder, expected),
    ]


def tie_check(reference: Any, candidate: Any) -> Check:
    """Whether the candidate's head is its embeddings exactly where the reference's is."""
    tied = [is_tied(model) for model in (reference, candidate)]
    words = ["tied" if state else "separate" for state in tied]
    return Check("ties", tied[0] == tied[1], f"head and embeddings: {words[0]} in the source, {words[1]} here")


def arithmetic_check(at_once: float, one_by_one: float | None, noise: float = 0.0) -> Check:
    """Whether float32 sums of the stored weights say what the package's own type and kernels say.

    Both are mean KLDs in nats: of windows that are read at once, and of a text that is read token by token as
    `generate` reads, for which the package may have another kernel; None where it cannot be read so. `noise` is that of
    the original between float32 and the package's type: a package is not to blame for what its original does as well.
    """
    limit = max(ARITHMETIC_LIMIT, NOISE_FACTOR * noise)
    shifts = [f"{at_once:.6f} (read at once)"]
    if one_by_one is not None:
        shifts.append(f"{one_by_one:.6f} (one token at a time)")
    detail = (
        f"mean KLD {' and '.join(shifts)} between the package's own arithmetic on this CPU and float32 sums, which are "
        f"used from here on (limit {limit:.4g}"
    )
    of_original = f"; the original's own type shifts it by {noise:.6f})" if noise else ")"
    return Check("arithmetic", max(at_once, one_by_one or 0.0) <= limit, detail + of_original)


def misread_check(modules: int) -> Check:
    """In place of `arithmetic_check` where bitsandbytes' kernels cannot be the measure."""
    detail = (
        f"not compared: bitsandbytes misreads {modules} modules on this CPU, as their rows are no whole blocks; "
        f"all 4-bit matrices were dequantized to their real values"
    )
    return Check("arithmetic", True, detail)
