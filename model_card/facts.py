"""The facts that a card is made of, flat and frozen; every number was measured before it came here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CardSample:
    """One prompt and how each model went on."""

    prompt: str
    original: str
    quantized: str
    first_divergence: int | None


@dataclass(frozen=True)
class CardFacts:
    """Everything that a template may name. Sizes in bytes, divergences in nats, shares in 0..1.

    `source_repo_id` and `source_commit` are None for a local source; measured values are None in the card of a
    package that failed a structural check and was never scored. `source_card` is the whole of the source's README.
    """

    package_name: str
    source_name: str
    source_repo_id: str | None
    source_commit: str | None
    source_card: str | None
    hub: str
    architecture: str
    parameters: int
    recipe: str
    bits: int
    quant_type: str
    double_quant: bool
    dtype: str
    quantized_modules: int
    kept_modules: tuple[str, ...]
    source_bytes: int
    package_bytes: int
    bits_per_parameter: float
    grade: str
    required_grade: str
    passed: bool
    reasons: tuple[str, ...]
    corpus: str | None
    corpus_sha256: str | None
    scored_tokens: int
    window: int
    windows: int
    corpus_windows: int
    reference_dtype: str
    reference_perplexity: Interval | None
    candidate_perplexity: Interval | None
    perplexity_ratio: Interval | None
    kld: Interval | None
    kld_median: float | None
    kld_p99: float | None
    same_top: Interval | None
    delta_p_rms: Interval | None
    ratio_limit: float | None
    kld_limit: float | None
    identical_at_16: float | None
    identical_at_32: float | None
    prefill_agreement: float | None
    cached_agreement: float | None
    new_tokens: int
    seed: int
    greedy_samples: tuple[CardSample, ...]
    sampled_samples: tuple[CardSample, ...]
    figures: tuple[str, ...]
    device_name: str
    versions: dict[str, str]
    remote_code: bool
    tool_version: str
    created: str
    command: str
