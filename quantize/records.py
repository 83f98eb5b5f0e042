"""What passes between stages and what JSON stores: frozen records of the source, the recipe and the package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
"""Of the package: raised when an older `quantize` could not read what a newer one wrote."""

Scalar = bool | int | float | str
"""What an option of a method may be."""


Stamp = tuple[int, int, int, int]
"""What another write to a file changes; see `files.stamp`."""


@dataclass(frozen=True)
class FileRecord:
    """One file: `path` relative to its folder with forward slashes, `size` in bytes."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The original model, pinned: `commit` is None for a local folder, whose hashes pin it instead.

    `remote_code` says that code of its own was allowed and is run, `code_left_out` that its configs name some which was
    not allowed, and nothing here names it any more. `transformers_version` is the one that its config.json names.
    """

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
    code_left_out: bool = False
    transformers_version: str = ""

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
    """A source and the local folder that holds its files, with their stamps from when they were hashed."""

    source: Source
    folder: Path
    stamps: Mapping[str, Stamp] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How weights become 4-bit (or 8-bit, where only `skip_modules` and `compute_dtype` matter).

    `name` is that of a method in quantize/methods, or `auto`, which tries them from the plainest on until
    `target_grade` is reached, in files of up to `max_size` times the bytes of plain 4-bit ones. `options` are the
    method's own that differ from their defaults, by name.

    Towers, through which pictures and sounds enter a model, stay in half precision unless `quantize_towers`.

    A skipped name is a run of whole parts of a module's name: `h.0`, `attn` and `h.0.attn.c_attn` all skip
    `transformer.h.0.attn.c_attn`.
    """

    name: str = "auto"
    target_grade: str = "parity"
    max_size: float = 1.5
    bits: int = 4
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "auto"
    skip_modules: tuple[str, ...] = ()
    quantize_towers: bool = False
    options: Mapping[str, Scalar] = field(default_factory=dict)

    def skips(self, module: str) -> bool:
        return any(f".{name}." in f".{module}." for name in self.skip_modules)


@dataclass(frozen=True)
class CalibrationText:
    """The text that was calibrated on: where from, how much, and the sha256 of its tokens as 64-bit integers.

    `left_out` windows repeated a passage of the corpus that the package is judged by. A text of a data set on the Hub
    has its `repo_id`, and the `commit` that was read.
    """

    source: str
    seed: int
    windows: int
    length: int
    left_out: int
    sha256: str
    repo_id: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Quantized:
    """What a recipe did: module names, the half-precision type of the rest, where and how long (seconds).

    For the sake of accuracy `half_precision_modules` were kept in half precision, and `block_32_modules` have blocks of
    32. Inputs of 8-bit modules are outliers from `outlier_threshold` on; None means that of stock transformers.
    """

    modules: tuple[str, ...]
    kept_modules: tuple[str, ...]
    dtype: str
    device: str
    seconds: float
    calibration_text: CalibrationText | None = None
    half_precision_modules: tuple[str, ...] = ()
    block_32_modules: tuple[str, ...] = ()
    outlier_threshold: float | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """How a candidate is measured. `window` and `new_tokens` in tokens."""

    corpus: str = "builtin"
    window: int = 1024
    max_windows: int = 512
    new_tokens: int = 64
    seed: int = 0
    full: bool = False
    controls: bool = False
    standard_perplexities: bool = False
    require: str = "good"


@dataclass(frozen=True)
class Environment:
    """What a measurement ran on: versions by distribution name, and the processor that computed."""

    python: str
    platform: str
    device: str
    device_name: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Publisher:
    """Who publishes: a name, and links by their label."""

    name: str
    links: dict[str, str]


@dataclass(frozen=True)
class Provenance:
    """Where a package comes from, and the hashes that show it is unchanged (of every file but this one).

    `name` is what its card calls it: the repo that it was made for, otherwise its folder's name. `key` is that of its
    `demand`. `requested` is the recipe that was asked for, where `auto` chose another. `texts` are as in Demand.
    `source_card` is the source's own card, and `card_template` the sha256 of the publisher's template, if the package's
    card was rendered from one. `blob_ids` are git's names of the small files, by which the Hub lists them.
    """

    tool: str
    tool_version: str
    created: str
    source: Source
    recipe: Recipe
    quantized: Quantized
    settings: EvaluationSettings
    environment: Environment
    publisher: Publisher | None = None
    name: str = ""
    key: str = ""
    requested: Recipe | None = None
    texts: dict[str, str] = field(default_factory=dict)
    source_card: str | None = None
    card_template: str | None = None
    files: tuple[FileRecord, ...] = ()
    blob_ids: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def requested_recipe(self) -> Recipe:
        """The recipe that was asked for."""
        return self.requested or self.recipe

    @property
    def demand(self) -> Demand:
        """What was asked for."""
        return Demand(self.requested_recipe, self.settings, self.texts)


@dataclass(frozen=True)
class Demand:
    """What a package is asked to be: by which recipe, measured how, on which texts of the user's own.

    A text is named without its folder, as `./contracts.txt`; `texts` has the sha256 of its content, by the field of the
    option that names it.
    """

    recipe: Recipe
    settings: EvaluationSettings
    texts: Mapping[str, str] = field(default_factory=dict)

    def key(self, source_name: str, pinned: str) -> str:
        """What a package is made of and how it is measured, as one sha256, with its source's commit or digest.

        The required grade does not count, since what reached a stricter one reached the other as well. Neither do
        parameters at their defaults, so that a new one leaves old keys as they are.
        """
        contents = {
            "source": source_name,
            "pinned": pinned,
            "recipe": _changed(self.recipe, Recipe()),
            "measured": _changed(replace(self.settings, require=EvaluationSettings.require), EvaluationSettings()),
            "texts": dict(self.texts),
            "format": FORMAT_VERSION,
        }
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _changed(record: Any, default: Any) -> dict[str, Any]:
    """The fields of a record that are not as in `default`."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}
