"""How much of a text stands in another one as well, in any script, word by word or nearly so."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

COPIED, ALIKE = 60, 20
"""Letters in a row: as many as 13 words have, which two texts share only where one was copied from the other, and as
four words have, which texts of one kind share now and then, and a copy with changes shares most of the time."""
NEAR_COPY = 0.2
"""Share of a text's rows of ALIKE letters that lie in another one, from which on it is a copy with changes."""
WIDE = re.compile("[\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Letters of Chinese, Japanese and Korean, each of which says about as much as three others."""
BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Passages:
    """All rows of letters of a text, by sorted hashes."""

    copied: np.ndarray[Any, Any]
    alike: np.ndarray[Any, Any]

    @classmethod
    def of(cls, text: str) -> Passages:
        kept = letters(text)
        return cls(np.unique(_rows(kept, COPIED)), np.unique(_rows(kept, ALIKE)))

    def repeated_by(self, text: str) -> bool:
        """Whether `text` has a passage that was copied from this one, or is a copy of a part of it with changes."""
        kept = letters(text)
        return bool(_among(_rows(kept, COPIED), self.copied).any()) or self._is_near_copy(kept)

    def share_in(self, texts: Iterable[str]) -> float:
        """How much of `texts` is of this one: the share of copied rows, or of texts with changes if that is more."""
        kept = [letters(text) for text in texts]
        copied = np.concatenate([_among(_rows(one, COPIED), self.copied) for one in kept])
        near = [self._is_near_copy(one) for one in kept]
        return max(float(copied.mean()) if copied.size else 0.0, sum(near) / len(near))

    def _is_near_copy(self, kept: str) -> bool:
        alike = _among(_rows(kept, ALIKE), self.alike)
        return bool(alike.size) and float(alike.mean()) >= NEAR_COPY


def letters(text: str) -> str:
    """Letters and digits alone, in one form: without case, accents, spaces and marks; wide ones count as three."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    return WIDE.sub(r"\g<0>\g<0>\g<0>", unicodedata.normalize("NFC", re.sub(r"[\W_]+", "", folded)))


def _rows(kept: str, length: int) -> np.ndarray[Any, Any]:
    """Hashes uint64 of all rows of `length` letters, in their order."""
    codes = np.frombuffer(kept.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    count = max(len(codes) - length + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for place in range(length if count else 0):
        hashes = hashes * BASE + codes[place : place + count]
    return hashes


def _among(rows: np.ndarray[Any, Any], known: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which of the rows are among the sorted `known` ones."""
    if not known.size:
        return np.zeros(len(rows), bool)
    found: np.ndarray[Any, Any] = known[np.searchsorted(known, rows).clip(max=len(known) - 1)] == rows
    return found
