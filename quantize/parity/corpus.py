"""The text that both models read."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from quantize import hub
from quantize.errors import CorpusError
from quantize.evidence import DatasetRecord
from quantize.options import CORPORA, CORPUS_TEXT
from quantize.records import EvaluationSettings

BUILTIN, WIKITEXT = CORPORA
WIKITEXT_REPO, WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
WIKITEXT_FILE = f"{WIKITEXT_CONFIG}/test-00000-of-00001.parquet"
FIRST_HEADING = re.compile(r"= (?!=).*(?<!=) =")
SPELLING = (
    (r"s '", r"s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    *((f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= (?==)", "="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


@dataclass(frozen=True)
class Document:
    """A text to be read on its own, and the words and bytes that its nll is spread over."""

    text: str
    words: int
    bytes: int


@dataclass(frozen=True)
class Corpus:
    """A text and the name it goes by in the evidence; `pages` are the articles of a WikiText, as they are stored."""

    name: str
    text: str
    pages: tuple[str, ...] = ()
    dataset: DatasetRecord | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def documents(self) -> tuple[Document, ...]:
        """Pages as lm-evaluation-harness reads them, or the whole text where there are none.

        Words and bytes are those of the stored text, not of the one that is read.
        """
        stored = self.pages or (self.text,)
        read = [detokenized(page) for page in self.pages] or [self.text]
        return tuple(
            Document(text, len(re.split(r"\s+", original)), len(original.encode()))
            for text, original in zip(read, stored, strict=True)
        )


def load(name: str) -> Corpus:
    """The built-in corpus, WikiText-2, or a UTF-8 text file; raises CorpusError rather than fall back to another."""
    if name == BUILTIN:
        return Corpus(BUILTIN, builtin_text())
    if name == WIKITEXT:
        return wikitext()
    path = CORPUS_TEXT.file(name)
    if path is None:
        raise CorpusError(f"no corpus {name!r}: name a text file, {BUILTIN!r} or {WIKITEXT!r}")
    try:
        return Corpus(path.name, path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start})") from error


def corpus_text(settings: EvaluationSettings) -> str:
    """The text that a package is evaluated on: nothing that it is made from may repeat it."""
    return load(settings.corpus).text


def builtin_text() -> str:
    """English technical prose that comes with every Python: its language reference, as `help()` shows it.

    The topics share paragraphs; each is used once. Half of the topics, chosen by the hash of their name and so
    the same in every version of Python, are reserved for measuring: a test model may be trained on the others.
    """
    from pydoc_data.topics import topics

    reserved = [topics[name] for name in sorted(topics) if is_reserved(name)]
    paragraphs = (part.strip() for topic in reserved for part in topic.split("\n\n"))
    return "\n\n".join(part for part in dict.fromkeys(paragraphs) if part) + "\n"


def wikitext() -> Corpus:
    """The raw test split of WikiText-2 at the dataset's present commit, which becomes part of the name.

    Rows are joined by empty lines, as the Hugging Face perplexity guide does. Raises CorpusError or HubUnreachable.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(
            "WikiText-2 is read with pyarrow: install it with `pip install quantize-bnb[wikitext]`"
        ) from None
    commit, path = hub.dataset_file(WIKITEXT_REPO, WIKITEXT_FILE)
    rows = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    dataset = DatasetRecord(WIKITEXT_REPO, WIKITEXT_CONFIG, "test", commit)
    name = f"{WIKITEXT_REPO}@{commit} {WIKITEXT_CONFIG} test"
    return Corpus(name, "\n\n".join(rows), tuple(pages_of("".join(rows))), dataset)


def pages_of(text: str) -> list[str]:
    """A WikiText's articles: each begins with a heading of the first level, ` = Title = `."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if FIRST_HEADING.fullmatch(line.strip()):
            pages.append([])
        pages[-1].append(line)
    joined = ["\n".join(page) for page in pages]
    return [page for page in joined if page.strip()]


def detokenized(page: str) -> str:
    """A WikiText page in ordinary spelling, by the substitutions of lm-evaluation-harness's task wikitext."""
    for pattern, replacement in SPELLING:
        page = re.sub(pattern, replacement, page)
    return page


def is_reserved(topic: str) -> bool:
    return hashlib.sha256(topic.encode()).digest()[0] % 2 == 1
