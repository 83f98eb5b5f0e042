"""The evidence of a comparison: what was measured, with intervals, and what parity concludes from it."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.records import Environment, Recipe

FORMAT_VERSION = 2
"""Of the evidence: raised when an older `quantize` could not read what a newer one wrote."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval, of the level that the plan of looks leaves: 95 % for a single attempt."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DatasetRecord:
    """A part of a data set on the Hub, at the commit that was read."""

    repo_id: str
    config: str
    split: str
    revision: str


@dataclass(frozen=True)
class CorpusRecord:
    """The text that was scored: `windows` whole windows of `window` tokens, `scored` of them read.

    `repeated` windows were passed over while drawing, because they repeat what others say. Of each window the `prefix`
    is not scored, which the tokenizer puts before every text, or else the first token.
    """

    name: str
    dataset: DatasetRecord | None
    sha256: str
    characters: int
    tokens: int
    window: int
    windows: int
    scored: int
    repeated: int = 0
    prefix: int = 0

    @property
    def scored_tokens(self) -> int:
        return self.scored * (self.window - max(1, self.prefix))


@dataclass(frozen=True)
class Distribution:
    """A per-token quantity: its mean with an interval, its percentiles by name (`p50` ...), its extremes."""

    mean: Estimate
    percentiles: dict[str, float]
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values between `edges[i]` and `edges[i + 1]`; the outermost bins take what lies beyond."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class WindowFigures:
    """Each scored window in the order of reading: its mean nll difference (candidate - reference) and KLD, in nats."""

    nll_difference: tuple[float, ...] = ()
    kld: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scores:
    """Reference against candidate on the same tokens; nats throughout.

    The verdict is judged from `window_figures`: the intervals of `perplexity_ratio` and `kld.mean` are those of the
    last look. All other intervals are those of this sample, not adjusted for having stopped early. `kld_by_position`
    holds mean divergences of equal stretches of the window, from its start to its end.
    """

    reference_perplexity: Estimate
    candidate_perplexity: Estimate
    perplexity_ratio: Estimate
    kld: Distribution
    same_top: Estimate
    delta_p: Distribution
    delta_p_rms: Estimate
    kld_histogram: Histogram
    kld_by_position: tuple[float, ...]
    window_figures: WindowFigures = WindowFigures()


@dataclass(frozen=True)
class LookPlan:
    """When scoring may stop: at looks at up to `windows` windows, the only one at all of them when `full`.

    `required` is the grade that looks are to settle, and `error` this attempt's share of the 5 % that intervals may
    miss; see quantize/parity/sequential.py.
    """

    windows: int
    required: str
    full: bool
    error: float


@dataclass(frozen=True)
class Look:
    """One look at the windows scored so far, and the error of its plain intervals."""

    windows: int
    error: float
    perplexity_ratio: Estimate
    kld: Estimate
    certain: bool


@dataclass(frozen=True)
class Framing:
    """The corpus scored once more, each window as an answer: `corpus.prefix` tokens of a chat template stand before it.

    Judged like the plain windows.
    """

    corpus: CorpusRecord
    scores: Scores
    look_plan: LookPlan
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class PictureFigures:
    """Of each picture in their order: its kind, its answer's tokens, their mean KLD (nats), and the share of them whose
    most likely token is the same."""

    kinds: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    kld: tuple[float, ...] = ()
    same_top: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures with a question each, which the reference answered greedily in up to `new_tokens` tokens.

    Both models then read its answers; in a `chat` template where there is one. `sha256` is that of pixels and
    questions. The intervals are over pictures and follow from `figures`.
    """

    seed: int
    sha256: str
    new_tokens: int
    chat: bool
    figures: PictureFigures
    kld: Estimate
    same_top: Estimate

    @property
    def count(self) -> int:
        return len(self.figures.kld)


@dataclass(frozen=True)
class Control:
    """Another version of the source, scored on the same windows: what noise and the alternatives would give.

    Where it gave no figures, they are None and `problem` says why.
    """

    name: str
    weight_bytes: int
    perplexity_ratio: Estimate | None
    kld: Estimate | None
    same_top: Estimate | None
    grade: str
    problem: str = ""


@dataclass(frozen=True)
class StandardPerplexity:
    """One figure of a published way to state a perplexity, for both models on the whole text; None for no number."""

    name: str
    method: str
    reference: float | None
    candidate: float | None


@dataclass(frozen=True)
class CacheRecord:
    """The error of keeping the reference's logits, computed in `dtype`, in `bits` bits each.

    Over the windows scored: KLD (nats) of the kept against the exact distribution, mean and largest, and the mean
    change of the correct token's nll, which is the error of the reference's log-perplexity.
    """

    bits: int
    dtype: str
    windows: int
    mean_kld: float
    largest_kld: float
    mean_nll_shift: float


@dataclass(frozen=True)
class Sample:
    """One prompt continued by both models, greedily and by sampling with the same seed.

    `first_divergence` counts new tokens up to the first greedy one that differs, None when all agree.
    Nll values are mean nats per new token of the sampled texts, under the reference.
    """

    prompt: str
    reference_greedy: str
    candidate_greedy: str
    first_divergence: int | None
    reference_sampled: str
    candidate_sampled: str
    reference_sampled_nll: float
    candidate_sampled_nll: float


@dataclass(frozen=True)
class Generation:
    """Generation parity over all prompts; shares lie in 0..1.

    `prefill_agreement` and `cached_agreement`: on the reference's own greedy text, how often the candidate's
    top token is the reference's, reading all at once and one token at a time with the cache.
    Repetition: share of 4-grams of the greedy text that occurred in it before.
    """

    new_tokens: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    identical_at_16: float
    identical_at_32: float
    prefill_agreement: float
    cached_agreement: float
    reference_repetition: float
    candidate_repetition: float
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Check:
    """One structural fact about the package, true or not, with what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What parity concludes; `reasons` says why it did not pass, and is empty otherwise. UNMEASURED does not pass."""

    grade: str
    required: str
    passed: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weight files, and what a weight costs: bits of those files per logical parameter."""

    source_bytes: int
    package_bytes: int
    parameters: int
    bits_per_parameter: float


@dataclass(frozen=True)
class Coverage:
    """Shares of the parameters, ties counted once: those in quantized matrices, and by kind those in half precision."""

    quantized: float
    kept: dict[str, float]


@dataclass(frozen=True)
class Attempt:
    """One recipe that `auto` tried, and what it gave; measured values are None where structure refused it.

    `failure` says why it could not be made or measured, and is empty where it was. Of a file whose size was looked for
    the KLD (nats) that was `predicted` is told as well.
    """

    recipe: Recipe
    grade: str
    perplexity_ratio: Estimate | None
    kld: Estimate | None
    same_top: Estimate | None
    weight_bytes: int
    seconds: float
    chosen: bool
    failure: str = ""
    predicted: float | None = None


@dataclass(frozen=True)
class Evidence:
    """The evidence. Scores and generation are None when a structural check already failed.

    The two types are those of the arithmetic; on a CPU the candidate's stored half-precision values are summed
    in float32 after a check that this makes no difference. `reference_devices` are the devices that held the
    reference's weights. `unused_tensors` lie in the source's files, and its model has no place for them. A `chat` model
    has a chat template, through which prompts went, and windows as well (`chat_framing`). Modules that are
    `misread_on_cpu`, by those with AVX-512, were measured at their real values. Of a model that `reads_pictures` either
    `pictures` were measured as well, or `pictures_left_out` says why not. `coverage` is None where a structural check
    failed before the weights were compared. `advice` says of a package that was refused what would help.
    """

    reference_dtype: str
    reference_devices: tuple[str, ...]
    candidate_dtype: str
    corpus: CorpusRecord | None
    checks: tuple[Check, ...]
    weight_errors: dict[str, float]
    scores: Scores | None
    looks: tuple[Look, ...]
    reference_cache: CacheRecord | None
    controls: tuple[Control, ...]
    standard_perplexities: tuple[StandardPerplexity, ...]
    generation: Generation | None
    verdict: Verdict
    sizes: Sizes
    environment: Environment
    seconds: float
    attempts: tuple[Attempt, ...] = ()
    unused_tensors: tuple[str, ...] = ()
    look_plan: LookPlan | None = None
    chat: bool = False
    chat_framing: Framing | None = None
    misread_on_cpu: tuple[str, ...] = ()
    coverage: Coverage | None = None
    reads_pictures: bool = False
    pictures: Pictures | None = None
    pictures_left_out: str = ""
    advice: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def modalities(self) -> str:
        """What was measured of all that the model reads."""
        if not self.reads_pictures:
            return "text"
        return "text and pictures" if self.pictures else f"text only: {self.pictures_left_out or 'nothing was asked'}"

    @property
    def confidence(self) -> float:
        """The level of all intervals."""
        return 1.0 - (self.look_plan.error if self.look_plan else 0.05)

    @property
    def missed_share(self) -> float:
        """The share of windows, all of one kind, of which those scored hold none with a probability of 5 %."""
        return 1.0 - 0.05 ** (1.0 / self.corpus.scored) if self.corpus and self.corpus.scored else 1.0

    @property
    def optional_stopping(self) -> bool:
        """Whether scoring could have ended at another look than it did."""
        return len(self.looks) > 1 or self.stopped_early

    @property
    def undecided(self) -> bool:
        """Whether more windows could settle a verdict that is not certain yet, in either framing."""
        scored = [(self.looks, self.look_plan)]
        if self.chat_framing is not None:
            scored.append((self.chat_framing.looks, self.chat_framing.look_plan))
        return any(plan and not looks[-1].certain and looks[-1].windows < plan.windows for looks, plan in scored)

    @property
    def stopped_early(self) -> bool:
        """Whether windows were left, because those scored were enough for the verdict."""
        if not self.looks or self.corpus is None:
            return False
        drawn = self.look_plan.windows if self.look_plan else self.corpus.windows
        return self.looks[-1].certain and self.looks[-1].windows < drawn
