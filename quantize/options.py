"""Every option of every command, declared once.

click's options, the catalogue's rules, the command that a card prints and the tables in README.md and
docs/scheduled.md are made from these rows. A method's own rows are in its file in quantize/methods, and
`methods.all_options` is the whole table.
"""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from quantize.errors import CorpusError
from quantize.grades import PASSING_GRADES
from quantize.records import EvaluationSettings, Recipe

DEFAULT_MODEL = "distilbert/distilgpt2"
HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:\b[\w.-]{1,96}\b/)?\b[\w.-]{1,96}\b(?<!\.git)", re.ASCII)
"""As the Hub's client checks it."""
LARGEST_SEED = 2**32 - 1
HUB_WAIT = 600.0
"""Seconds; the Hub counts requests in windows of 300."""
CORPORA = ("builtin", "wikitext-2")
"""Texts to compare on that have a name."""


# What a value may be, in words and as a test; `metavar` is what a help text calls it


@dataclass(frozen=True)
class Flag:
    """True or false."""

    metavar = None
    words: str = "true or false"

    def accepts(self, value: object) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """One of a few values, of the type of the first one."""

    metavar = None
    values: tuple[str, ...] | tuple[int, ...]

    @property
    def words(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"

    def accepts(self, value: object) -> bool:
        return any(type(value) is type(allowed) and value == allowed for allowed in self.values)


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds, which belong to it."""

    metavar = "N"
    low: int
    high: int | None = None

    @property
    def words(self) -> str:
        if self.high is None:
            return f"a whole number of at least {self.low}"
        return f"a whole number from {self.low} to {self.high}"

    def accepts(self, value: object) -> bool:
        return type(value) is int and self.low <= value and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Number:
    """A finite number of at least `low`."""

    metavar = "X"
    low: float

    @property
    def words(self) -> str:
        return f"a number from {self.low:g} on"

    def accepts(self, value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and self.low <= value < math.inf


@dataclass(frozen=True)
class Positive:
    """A finite number above 0."""

    metavar = "X"
    words: str = "a number above 0"

    def accepts(self, value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and 0 < value < math.inf


@dataclass(frozen=True)
class Text:
    """One line of text."""

    metavar: str = "TEXT"
    words: str = "one line of text"

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and value.strip() != "" and "\n" not in value


@dataclass(frozen=True)
class TextName:
    """One line of text: one of a few names, or a text of the user's own, which is a file unless it lies on the Hub."""

    names: tuple[str, ...]
    metavar: str = "TEXT"
    words: str = "one line of text"

    def accepts(self, value: object) -> bool:
        return Text().accepts(value)

    def file(self, value: str) -> Path | None:
        """The file that `value` means, if it does; raises CorpusError for one that would pass for another text."""
        if value in self.names:
            return None
        path = Path(value).expanduser()
        try:
            exists = path.is_file()
        except (OSError, ValueError):  # too long, or not possible as a path
            exists = False
        if exists and path.name.casefold() in self.names:
            raise CorpusError(f"{path} is called like the text {path.name.casefold()!r} of quantize: rename the file")
        return path if exists else None

    def bare(self, value: str) -> str:
        """What a record calls the text: a file without its folder, which is nobody else's business."""
        path = self.file(value)
        return value if path is None else f"./{path.name}"


@dataclass(frozen=True)
class HubId:
    """The id of a repo on the Hub."""

    metavar = "REPO"
    words: str = "a Hub id"
    with_owner: bool = False

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and HUB_ID.fullmatch(value) is not None and ("/" in value or not self.with_owner)


@dataclass(frozen=True)
class File:
    """A path that is not a folder's."""

    metavar = "FILE"
    words: str = "a file"

    def accepts(self, value: object) -> bool:
        return isinstance(value, Path)


@dataclass(frozen=True)
class Folder:
    """A path that is not a file's."""

    metavar = "FOLDER"
    words: str = "a folder"

    def accepts(self, value: object) -> bool:
        return isinstance(value, Path)


Kind = Flag | Choice | Whole | Number | Positive | Text | TextName | HubId | File | Folder


# A row


RUN, VERIFY, CARD, PUSH, SYNC, DOCTOR = COMMANDS = ("run", "verify", "card", "push", "sync", "doctor")


@dataclass(frozen=True)
class Option:
    """One option: `flag` as it is typed, and the `field` that it fills.

    `owner` is the record that has the field and its default, for what describes the package; such options are keys of
    a catalogue as well, and part of the command with which a card says how to make the package again, unless
    `reproduced` says otherwise. Other options have their default here; they are keys only if they have a `key`, and
    repeated on the card only if `reproduced`. `key` is also what a catalogue calls a field by another name, and `unset`
    the value of an option without an owner that is not given: false, nothing or none, unless it is said here.

    `former` are flags that did the same in earlier versions, `former_keys` keys of a catalogue, `former_values` earlier
    words for its values; all still work and say what to write instead. `repeated` ones may be given several times,
    `required` ones must be given. A row without a flag is a key of the catalogue alone.
    """

    flag: str
    field: str
    kind: Kind
    help: str
    owner: type | None = None
    commands: tuple[str, ...] = (RUN,)
    former: tuple[str, ...] = ()
    former_keys: tuple[str, ...] = ()
    former_values: tuple[tuple[str, str], ...] = ()
    repeated: bool = False
    key: str = ""
    reproduced: bool | None = None
    short: str = ""
    unset: Any = None
    envvar: str = ""
    required: bool = False

    @property
    def default(self) -> Any:
        """The default of the owner's field, or of the row itself."""
        if self.owner is None:
            empty = False if isinstance(self.kind, Flag) else () if self.repeated else None
            return empty if self.unset is None else self.unset
        (item,) = (item for item in fields(self.owner) if item.name == self.field)
        return item.default if item.default_factory is MISSING else item.default_factory()

    def words(self, value: Any) -> list[str]:
        """What is typed to give it this value."""
        if isinstance(self.kind, Flag):
            on, _, off = self.flag.partition("/")
            return [on if value else off]
        values = value if self.repeated else (value,)
        return [word for item in values for word in (self.flag, str(item))]

    @property
    def catalogue_key(self) -> str | None:
        """What a catalogue calls it; None where a catalogue does not have it."""
        return self.key or (self.field if self.owner else None)

    @property
    def on_card(self) -> bool:
        """Whether the command on a card repeats it where it is not the default."""
        return self.owner is not None if self.reproduced is None else self.reproduced


# The table


QUANT_TYPES = ("nf4", "fp4")
COMPUTE_DTYPES = ("auto", "float16", "bfloat16", "float32")

SOURCE = (
    Option(
        "--revision",
        "revision",
        Text("REVISION"),
        "Branch, tag or commit of a Hub model; resolved once to a commit.",
        key="revision",
        reproduced=True,
    ),
    Option("--output", "output", Folder(), "Folder of the package; by default MODEL-bnb-4bit here.", short="-o"),
)
"""Of RunRequest: what is quantized, and where the result goes."""

RECIPE = (
    Option("--bits", "bits", Choice((4, 8)), "Bits per weight: 4 (NF4 or FP4) or 8 (LLM.int8).", Recipe),
    Option(
        "--target",
        "target_grade",
        Choice(PASSING_GRADES),
        "The grade that auto looks for the smallest file of.",
        Recipe,
        reproduced=False,
    ),
    Option(
        "--max-size",
        "max_size",
        Number(1),
        "The largest file that auto tries, as a multiple of plain 4-bit.",
        Recipe,
        reproduced=False,
    ),
    Option("--quant-type", "quant_type", Choice(QUANT_TYPES), "The 4-bit data type.", Recipe),
    Option("--double-quant/--no-double-quant", "double_quant", Flag(), "Double quantization.", Recipe),
    Option(
        "--compute-dtype",
        "compute_dtype",
        Choice(COMPUTE_DTYPES),
        "dtype of matmuls (bnb_4bit_compute_dtype) and of unquantized layers; auto follows the original.",
        Recipe,
    ),
    Option(
        "--skip-modules",
        "skip_modules",
        Text("NAME"),
        "Keep this module unquantized (the LM head always is).",
        Recipe,
        repeated=True,
    ),
    Option(
        "--quantize-towers",
        "quantize_towers",
        Flag(),
        "Quantize vision and audio towers and projectors too, which otherwise stay in half precision.",
        Recipe,
    ),
)
"""Of Recipe, besides its name and what belongs to one method; see `methods.recipe_options`."""

REQUEST = (
    Option(
        "--device",
        "device",
        Text("DEVICE"),
        "cpu, cuda, cuda:1, xpu; auto uses a GPU if there is one.",
        commands=(RUN, VERIFY, PUSH, SYNC),
        unset="auto",
    ),
    Option(
        "--trust-remote-code",
        "trust_remote_code",
        Flag(),
        "Allow code from the model's repo, and record that. Read the code first.",
        commands=(RUN, VERIFY),
        reproduced=True,
    ),
    Option(
        "--force",
        "force",
        Flag(),
        "Make the package again, though a finished one is here or on the Hub, or it was refused before.",
        commands=(RUN, SYNC),
    ),
    Option("--clean", "clean", Flag(), "Begin anew where a run was stopped, and leave no finished parts either."),
    Option(
        "--unverified",
        "unverified",
        Flag(),
        "Skip the comparison with the original and say so on the card; for models too large to evaluate here. "
        "Such a package is never published.",
        reproduced=True,
    ),
    Option(
        "--reference-cache",
        "reference_cache",
        File(),
        "Load the models one at a time and keep the original's logits in this file, also for later runs.",
        commands=(RUN, VERIFY),
    ),
    Option(
        "--allow-no-derivatives",
        "allow_no_derivatives",
        Flag(),
        "Continue although the license forbids derivatives; only if you have the right to.",
        key="allow_no_derivatives",
    ),
)
"""Of RunRequest: how the work is done."""

_MEASURED = (RUN, VERIFY)
CORPUS_TEXT = TextName(CORPORA)
SETTINGS = (
    Option(
        "--corpus",
        "corpus",
        CORPUS_TEXT,
        "Text to compare on: builtin, wikitext-2 (from the Hub, needs the extra wikitext) or a text file.",
        EvaluationSettings,
        (*_MEASURED, PUSH),
    ),
    Option(
        "--window",
        "window",
        Whole(16),
        "Tokens per window, at most the model's context.",
        EvaluationSettings,
        _MEASURED,
    ),
    Option(
        "--max-windows",
        "max_windows",
        Whole(8),
        "Score at most this many windows.",
        EvaluationSettings,
        _MEASURED,
    ),
    Option("--new-tokens", "new_tokens", Whole(1), "Tokens generated per prompt.", EvaluationSettings, _MEASURED),
    Option(
        "--full",
        "full",
        Flag(),
        "Score every window, even after the verdict is certain.",
        EvaluationSettings,
        _MEASURED,
    ),
    Option(
        "--controls",
        "controls",
        Flag(),
        "Also measure the original in float16, int8 and NF4 rounded to nearest, on the same windows.",
        EvaluationSettings,
        _MEASURED,
    ),
    Option(
        "--standard-perplexities",
        "standard_perplexities",
        Flag(),
        "Also report perplexity as papers do: sliding window, and lm-evaluation-harness.",
        EvaluationSettings,
        _MEASURED,
        former=("--conventions",),
        former_keys=("conventions",),
    ),
    Option("--seed", "seed", Whole(0, LARGEST_SEED), "Random seed.", EvaluationSettings, _MEASURED),
    Option(
        "--require",
        "require",
        Choice(PASSING_GRADES),
        "The grade that the package must reach.",
        EvaluationSettings,
        _MEASURED,
    ),
)
"""Of EvaluationSettings."""

OUTCOME = (
    Option(
        "--against",
        "against",
        Text("MODEL"),
        "The original model: a Hub id or a folder. Required if the package does not name it.",
        commands=(VERIFY, CARD, PUSH),
    ),
    Option("--figures", "figures", Folder(), "Write the figures to this folder.", commands=(VERIFY,)),
    Option(
        "--card-template",
        "card_template",
        File(),
        "A Jinja template for the card's text, instead of the default one.",
        commands=(RUN, CARD, PUSH),
    ),
    Option("--facts", "facts", Flag(), "Print the variables of a template as JSON; change nothing.", commands=(CARD,)),
    Option("--preview", "preview", Flag(), "Also show the card in the terminal.", commands=(CARD,)),
    Option("--html", "html", File(), "Also write the card as an HTML page.", commands=(CARD,)),
)
"""What is read, shown and written after quantizing."""

_OWNED_REPO = HubId("a Hub id with its owner, such as you/distilgpt2-bnb-4bit", with_owner=True)
_CREATED = "created if missing."
DESTINATION = (
    Option("--push-to", "repo_id", _OWNED_REPO, f"Publish to this repo; {_CREATED}"),
    Option("--to", "repo_id", _OWNED_REPO, f"The repo to publish to; {_CREATED}", commands=(PUSH,), required=True),
    Option(
        "--private",
        "private",
        Flag(),
        "Publish to a private repo: make a new one private, and refuse a public one.",
        commands=(RUN, PUSH),
        key="private",
    ),
    Option(
        "--public",
        "public",
        Flag(),
        "Publish to a public repo though the original is private or gated; only if you have the right to.",
        commands=(RUN, PUSH),
        key="public",
    ),
    Option("--branch", "branch", Text("NAME"), f"Publish to this branch; {_CREATED}", commands=(RUN, PUSH)),
    Option(
        "--pr",
        "pull_request",
        Flag(),
        "Open a pull request, or update the open one.",
        commands=(RUN, PUSH),
    ),
    Option("--tag", "tag", Text("NAME"), "Also tag the commit.", commands=(RUN, PUSH)),
    Option("--message", "message", Text("TEXT"), "Commit message.", commands=(RUN, PUSH)),
    Option("--prune", "prune", Flag(), "Delete files of the repo not uploaded by quantize.", commands=(RUN, PUSH)),
)
"""Of the record that says where on the Hub a package goes."""

PUBLISHING = (
    Option(
        "--verify-download",
        "verify_download",
        Flag(),
        "Download what was published to an empty cache, check its hashes, load it, and score a sample of the recorded "
        "windows again.",
        commands=(RUN, PUSH, SYNC),
    ),
    Option(
        "--dry-run",
        "dry_run",
        Flag(),
        "Show what would be done; nothing is quantized or published.",
        commands=(RUN, PUSH, SYNC),
    ),
    Option(
        "--refresh-card",
        "refresh_card",
        Flag(),
        "Render published cards again, and push a card alone if only its wording changed.",
        commands=(RUN, SYNC),
    ),
)
"""How a package is published."""

CATALOGUE = (
    Option(
        "--output",
        "folder",
        Folder(),
        "Folder for evidence and unfinished work.",
        commands=(SYNC,),
        short="-o",
        unset=Path("sync"),
    ),
    Option("--only", "only", _OWNED_REPO, "Only this repo of the catalogue.", commands=(SYNC,), repeated=True),
    Option(
        "--max-models",
        "max_models",
        Whole(1),
        "Stop after this many models were published, refused or failed; the next run continues.",
        commands=(SYNC,),
    ),
    Option(
        "",
        "source",
        HubId("a Hub id such as distilbert/distilgpt2, never a folder"),
        "The original model.",
        commands=(),
        key="source",
    ),
    Option(
        "",
        "repo",
        _OWNED_REPO,
        "The repo to publish to; no two entries share one.",
        commands=(),
        former_keys=("target",),
        key="repo",
    ),
    Option(
        "",
        "max_source_gb",
        Positive(),
        "Skip an original whose weights are larger than this many GB (10^9 bytes).",
        commands=(),
        key="max_source_gb",
    ),
)
"""Of a job that keeps a catalogue published, and of the catalogue's entries alone."""

PUBLISHER = (
    Option(
        "--publisher",
        "name",
        Text("NAME"),
        "Who publishes; named on the card.",
        commands=(RUN, CARD, SYNC),
        envvar="QUANTIZE_PUBLISHER",
    ),
    Option(
        "--publisher-link",
        "links",
        Text("LABEL=URL"),
        "A link of the publisher.",
        commands=(RUN, CARD, SYNC),
        repeated=True,
        envvar="QUANTIZE_PUBLISHER_LINKS",
    ),
)
"""Of Publisher."""

HUB = (
    Option(
        "--hub-wait",
        "seconds",
        Positive(),
        "Where the Hub asks to wait, wait this many seconds for one answer in all, at most.",
        commands=(RUN, VERIFY, PUSH, SYNC),
        unset=HUB_WAIT,
        envvar="QUANTIZE_HUB_WAIT",
    ),
)
"""How the Hub is asked."""

DISPLAY = (
    Option("--json", "as_json", Flag(), "Print one JSON document to stdout.", commands=COMMANDS),
    Option("--quiet", "quiet", Flag(), "Print no progress and no tables, only errors.", commands=COMMANDS, short="-q"),
)
"""What is printed."""

OTHERS = (*REQUEST, *SETTINGS, *OUTCOME, *DESTINATION, *PUBLISHING, *CATALOGUE, *PUBLISHER, *HUB, *DISPLAY)
"""All that stand after the recipe's."""
