"""Every value that passes between stages: frozen records that round-trip through JSON.

Defaults of the command line stand here, once.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from quantize.errors import PackageError

FORMAT_VERSION = 1
"""Of the package: raised when an older `quantize` could not read what a newer one wrote."""

DEFAULT_MODEL = "distilbert/distilgpt2"

HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b(?<!\.git)", re.ASCII)
"""As the Hub's client checks it."""

STOCK, CALIBRATED, AUTO = "stock", "calibrated", "auto"
RECIPES = (AUTO, STOCK, CALIBRATED)
QUANT_TYPES = ("nf4", "fp4")
COMPUTE_DTYPES = ("auto", "float16", "bfloat16", "float32")
GRADES = ("lossless", "parity", "good", "degraded", "failed")
"""From best to worst; `changed` stands outside the order."""
UNMEASURED = "unmeasured"
"""In place of a grade, where somebody asked for no measurement."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class FileRecord:
    """One file: `path` relative to its folder with forward slashes, `size` in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The original model, pinned: `commit` is None for a local folder, whose hashes pin it instead."""

    name: str
    repo_id: str | None
    revision: str | None
    commit: str | None
    files: tuple[FileRecord, ...]
    architecture: str
    model_type: str
    dtype: str
    parameters: int
    remote_code: bool

    def fingerprint(self) -> dict[str, str]:
        """What has to agree for two sources to be the same one."""
        return {file.path: file.sha256 for file in self.files}

    @property
    def pinned(self) -> str:
        """The commit, or for a local folder a digest of its files."""
        listed = json.dumps(self.fingerprint(), sort_keys=True).encode()
        return self.commit or hashlib.sha256(listed).hexdigest()


@dataclass(frozen=True)
class Checkout:
    """A source and the local folder that holds its files."""

    source: Source
    folder: Path


@dataclass(frozen=True)
class Recipe:
    """How weights become 4-bit (or 8-bit, where only `skip_modules` and `compute_dtype` matter).

    `stock` rounds to nearest. `calibrated` chooses codes and scales on calibration text, in `sweeps` over each matrix
    after the first pass, and then learns rounding in `epochs` of reading that text. `auto` climbs from one to the other
    until `target_grade` is reached.

    Weights may take `size_budget` times the bytes of their plain 4-bit form; a calibrated recipe spends the rest on
    blocks of 32 and on matrices in half precision, where that helps most.

    A skipped name is a run of whole parts of a module's name: `h.0`, `attn` and `h.0.attn.c_attn` all skip
    `transformer.h.0.attn.c_attn`.

    Calibration looks at `calibration_windows` of `calibration_length` tokens; `calibration` is `self` for text that the
    source writes, a text file, or `owner/name:path` in a Hub data set.
    """

    name: str = AUTO
    target_grade: str = "parity"
    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "auto"
    skip_modules: tuple[str, ...] = ()
    size_budget: float = 1.0
    sweeps: int = 1
    epochs: int = 0
    calibration: str = "self"
    calibration_windows: int = 128
    calibration_length: int = 512
    calibration_seed: int = 0

    def skips(self, module: str) -> bool:
        return any(f".{name}." in f".{module}." for name in self.skip_modules)


@dataclass(frozen=True)
class Calibrated:
    """The text that was calibrated on: where from, how much, and the sha256 of its tokens as 64-bit integers.

    `left_out` windows shared a run of words with the corpus that the package is judged by.
    """

    source: str
    seed: int
    windows: int
    length: int
    left_out: int
    sha256: str


@dataclass(frozen=True)
class Quantized:
    """What a recipe did: module names, the half-precision type of the rest, where and how long (seconds).

    Under a size budget `spared` are the modules that stay in half precision for it, `fine` those in blocks of 32.
    """

    modules: tuple[str, ...]
    kept_modules: tuple[str, ...]
    dtype: str
    device: str
    seconds: float
    calibrated: Calibrated | None = None
    spared: tuple[str, ...] = ()
    fine: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParitySettings:
    """How a candidate is measured. `window` and `new_tokens` in tokens."""

    corpus: str = "builtin"
    window: int = 1024
    max_windows: int = 512
    new_tokens: int = 64
    seed: int = 0
    full: bool = False
    controls: bool = False
    conventions: bool = False
    require: str = "good"


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95 % interval."""

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
    """The text that was scored: `windows` whole windows of `window` tokens, `scored` of them read."""

    name: str
    dataset: DatasetRecord | None
    sha256: str
    characters: int
    tokens: int
    window: int
    windows: int
    scored: int


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
class Scores:
    """Reference against candidate on the same tokens; nats throughout.

    `kld_by_position` holds mean divergences of equal stretches of the window, from its start to its end.
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


@dataclass(frozen=True)
class Look:
    """One look at the windows scored so far: intervals that may err with `error`, all looks' errors adding to 5 %."""

    windows: int
    error: float
    perplexity_ratio: Estimate
    kld: Estimate
    certain: bool


@dataclass(frozen=True)
class Control:
    """Another version of the source, scored on the same windows: what noise and the alternatives would give."""

    name: str
    weight_bytes: int
    perplexity_ratio: Estimate
    kld: Estimate
    same_top: Estimate
    grade: str


@dataclass(frozen=True)
class Convention:
    """One figure of a published way to state a perplexity, for both models on the whole text."""

    name: str
    method: str
    reference: float
    candidate: float


@dataclass(frozen=True)
class CacheRecord:
    """What it cost that the reference's answers, computed in `dtype`, were kept in `bits` bits a logit.

    Over the windows scored: KLD (nats) of the kept against the exact distribution, mean and largest, and the mean
    change of the right token's nll, which is the error of the reference's log-perplexity.
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
class Environment:
    """What a measurement ran on: versions by distribution name, and the processor that computed."""

    python: str
    platform: str
    device: str
    device_name: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Rung:
    """One recipe that `auto` tried, and what it gave; measured values are None where structure refused it."""

    recipe: Recipe
    grade: str
    perplexity_ratio: Estimate | None
    kld: Estimate | None
    same_top: Estimate | None
    weight_bytes: int
    seconds: float
    chosen: bool


@dataclass(frozen=True)
class Parity:
    """The evidence. Scores and generation are None when a structural check already failed.

    The two types are those of the arithmetic; on a CPU the candidate's stored half-precision values are summed
    in float32 after a check that this makes no difference. `reference_places` are the devices that held the
    reference's weights.
    """

    reference_dtype: str
    reference_places: tuple[str, ...]
    candidate_dtype: str
    corpus: CorpusRecord | None
    checks: tuple[Check, ...]
    weight_errors: dict[str, float]
    scores: Scores | None
    looks: tuple[Look, ...]
    reference_cache: CacheRecord | None
    controls: tuple[Control, ...]
    conventions: tuple[Convention, ...]
    generation: Generation | None
    verdict: Verdict
    sizes: Sizes
    environment: Environment
    seconds: float
    rungs: tuple[Rung, ...] = ()


@dataclass(frozen=True)
class Publisher:
    """Who publishes: a name, and links by their label."""

    name: str
    links: dict[str, str]


@dataclass(frozen=True)
class Provenance:
    """Where a package comes from, and the hashes that show it is unchanged (of every file but this one).

    `name` is what its card calls it: the repo that it was made for, otherwise its folder's name. `key` says what the
    package is made of; see `package_key`. `asked` is the recipe that was asked for, where `auto` chose another.
    """

    tool: str
    tool_version: str
    created: str
    source: Source
    recipe: Recipe
    quantized: Quantized
    settings: ParitySettings
    environment: Environment
    publisher: Publisher | None = None
    name: str = ""
    key: str = ""
    asked: Recipe | None = None
    files: tuple[FileRecord, ...] = ()
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def wanted(self) -> Recipe:
        """The recipe that was asked for."""
        return self.asked or self.recipe


@dataclass(frozen=True)
class Target:
    """Where on the Hub a package goes, and how.

    `branch` None means main; `private` matters for a new repo only; `prune` also deletes files that no package put
    there.
    """

    repo_id: str
    private: bool = False
    branch: str | None = None
    pull_request: bool = False
    tag: str | None = None
    message: str | None = None
    prune: bool = False


@dataclass(frozen=True)
class Change:
    """What a push does to one path: `create`, `replace`, `delete` or `keep`; sizes in bytes, 0 for a deletion."""

    action: str
    path: str
    size: int


@dataclass(frozen=True)
class Plan:
    """What a push would do. `head` is the commit that it goes on top of, None where the repo is made first.

    `revision` None means main. With `pull_request` and no `revision`, a new pull request is opened.
    """

    repo_id: str
    creates_repo: bool
    creates_branch: bool
    revision: str | None
    pull_request: bool
    head: str | None
    changes: tuple[Change, ...]

    @property
    def idle(self) -> bool:
        """Whether everything is there already."""
        return not self.creates_branch and all(change.action == "keep" for change in self.changes)


@dataclass(frozen=True)
class Downloaded:
    """The proof by download: what was fetched into an empty cache, and the loss (nats a token) of a sample text.

    `sample_nll` is that of the model from the Hub, `package_nll` that of the local package on the same device, None
    where there is none.
    """

    files: int
    bytes: int
    sample_tokens: int
    sample_nll: float
    package_nll: float | None
    seconds: float


@dataclass(frozen=True)
class Receipt:
    """What a push did: the commit that holds the package now, and whether this push made it. Times are in UTC."""

    repo_id: str
    commit: str
    url: str
    created_commit: bool
    files: tuple[FileRecord, ...]
    key: str = ""
    branch: str | None = None
    pull_request: str | None = None
    tag: str | None = None
    started: str = ""
    finished: str = ""
    downloaded: Downloaded | None = None


def package_key(source_name: str, pinned: str, recipe: Recipe) -> str:
    """What a package is made of, as one sha256: source, its commit or digest, recipe, format version.

    Parameters at their defaults do not count, so that a new one leaves old keys as they are.
    """
    parameters = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
    changed = {name: value for name, value in parameters.items() if value != getattr(Recipe, name)}
    made_of = {"source": source_name, "pinned": pinned, "recipe": changed, "format": FORMAT_VERSION}
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def now() -> str:
    """This second in UTC, as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def to_json(record: object) -> str:
    """The record as JSON text; refuses NaN, which JSON cannot say."""
    return json.dumps(_converter().unstructure(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(kind: type[Record], text: str, where: object) -> Record:
    """The record that `to_json` wrote; `where` names the file for the error line."""
    try:
        return _converter().structure(json.loads(text), kind)  # type: ignore[no-any-return]
    except Exception as error:
        names = ", ".join(item.name for item in fields(kind))  # type: ignore[arg-type]
        raise PackageError(f"{where} is not readable as {kind.__name__} ({names}): {error}") from error


def read_record(kind: type[Record], path: Path) -> Record:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise PackageError(f"{path.parent} is not a package: {path.name} is missing") from None
    except UnicodeDecodeError:
        raise PackageError(f"{path} is not UTF-8 text: restore it, or make the package again") from None
    return from_json(kind, text, path)


def grade_at_least(grade: str, required: str) -> bool:
    """Whether `grade` is as good as `required`; a model graded `changed` never is."""
    return grade in GRADES and GRADES.index(grade) <= GRADES.index(required)


@functools.cache
def _converter() -> Any:
    from cattrs.preconf.json import make_converter

    return make_converter()
