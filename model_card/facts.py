"""The facts that a card is made of, flat and frozen; every number was measured before it came here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A measured value and its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CardSample:
    """One prompt and each model's continuation of it."""

    prompt: str
    original: str
    quantized: str
    first_divergence: int | None


@dataclass(frozen=True)
class CardPublisher:
    """Who publishes: a name, and links as pairs of label and address."""

    name: str
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CardControl:
    """Another version of the source on the same windows; size in bytes, and why where there are no figures."""

    name: str
    size: int
    perplexity_ratio: Interval | None
    kld: Interval | None
    same_top: Interval | None
    grade: str
    problem: str


@dataclass(frozen=True)
class CardCalibration:
    """The calibration text; `source` is `self` where the original generated it."""

    source: str
    windows: int
    length: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class CardAttempt:
    """One attempt of the recipe search; size in bytes, measured values None where it failed a structural check.

    `failure` says why it could not be made, and is empty where it was. `predicted` is the KLD (nats) that was expected
    of a file whose size was looked for.
    """

    name: str
    size: int
    perplexity_ratio: Interval | None
    kld: Interval | None
    same_top: Interval | None
    grade: str
    chosen: bool
    failure: str = ""
    predicted: float | None = None


@dataclass(frozen=True)
class CardStandardPerplexity:
    """A perplexity as papers report it, for both models; None where it is no number."""

    name: str
    method: str
    original: float | None
    quantized: float | None


@dataclass(frozen=True)
class CardDataset:
    """A data set of the Hub at a commit."""

    repo_id: str
    config: str
    split: str
    revision: str


@dataclass(frozen=True)
class CardFacts:
    """Everything that a template may use. Sizes in bytes, divergences in nats, shares in 0..1.

    `key` is the package key of provenance.json. `source_repo_id` and `source_commit` are None for
    a local source; measured values are None in the card of a package that failed a structural check, or was not to be
    measured. `source_card` is the whole of the source's README; `corpus_dataset` is None for a text that is not from
    the Hub. Intervals are of level `confidence`; with `optional_stopping` only those of the two figures with a limit
    hold although scoring may have `stopped_early`. Windows of a kind that is rarer than `missed_share` can have been
    missed (5 %). `method_description` says how codes were chosen. Of the quantized modules `block_32_modules` have
    blocks of 32 weights; `half_precision_modules` of the kept ones are kept for the sake of accuracy. `unused_tensors`
    are layers of the source's files that its model has no place for, each with its number of tensors. A `chat` model
    has a chat template, which its prompts went through; `chat_ratio` and `chat_kld` are those of `chat_windows` in it.
    CPUs with AVX-512 misread as many layers as `misread_on_cpu`. `copied_files` are the same bytes as the original's.
    Of the parameters `quantized_share` lies in quantized layers, None where that was not counted, and `kept_shares` in
    each kind of what stays in half precision.
    `own_code` is the file of code without which the experts of this model are not loaded, empty where there is none.
    A model that `reads_pictures` is asked about them through its `processor`, where there is one, and in its chat
    template where it has one for pictures (`picture_chat`). Where it was not asked about any, `pictures_left_out` may
    say why; figures are those of the `picture_tokens` of its answers about so many `pictures`.
    """

    publisher: CardPublisher | None
    package_name: str
    key: str
    source_name: str
    source_repo_id: str | None
    source_commit: str | None
    source_card: str | None
    hub: str
    architecture: str
    parameters: int
    recipe: str
    method_description: str
    calibration: CardCalibration | None
    attempts: tuple[CardAttempt, ...]
    bits: int
    quant_type: str
    double_quant: bool
    dtype: str
    quantized_modules: int
    block_32_modules: int
    half_precision_modules: int
    copied_files: tuple[str, ...]
    kept_modules: tuple[str, ...]
    quantized_share: float | None
    kept_shares: tuple[tuple[str, float], ...]
    unused_tensors: tuple[tuple[str, int], ...]
    source_bytes: int
    package_bytes: int
    bits_per_parameter: float
    grade: str
    required_grade: str
    passed: bool
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    corpus: str | None
    corpus_dataset: CardDataset | None
    corpus_sha256: str | None
    scored_tokens: int
    window: int
    windows: int
    corpus_windows: int
    confidence: float
    missed_share: float
    optional_stopping: bool
    stopped_early: bool
    reference_dtype: str
    reference_perplexity: Interval | None
    candidate_perplexity: Interval | None
    perplexity_ratio: Interval | None
    kld: Interval | None
    kld_median: float | None
    kld_p99: float | None
    same_top: Interval | None
    delta_p_rms: Interval | None
    controls: tuple[CardControl, ...]
    standard_perplexities: tuple[CardStandardPerplexity, ...]
    ratio_limit: float | None
    kld_limit: float | None
    identical_at_16: float | None
    identical_at_32: float | None
    prefill_agreement: float | None
    cached_agreement: float | None
    chat: bool
    chat_windows: int
    chat_ratio: Interval | None
    chat_kld: Interval | None
    reads_pictures: bool
    processor: bool
    picture_chat: bool
    pictures: int
    pictures_sha256: str
    picture_tokens: int
    picture_kld: Interval | None
    picture_same_top: Interval | None
    pictures_left_out: str
    misread_on_cpu: int
    new_tokens: int
    seed: int
    greedy_samples: tuple[CardSample, ...]
    sampled_samples: tuple[CardSample, ...]
    figures: tuple[str, ...]
    device_name: str
    versions: dict[str, str]
    least_versions: dict[str, str]
    remote_code: bool
    code_left_out: bool
    own_code: str
    tool_version: str
    created: str
    command: str
