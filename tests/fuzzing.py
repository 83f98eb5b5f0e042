"""Damages what the readers read and sees that they say so: `scripts/fuzz [--minutes N] [READER ...]`.

A reader may accept any bytes, or refuse them with a QuantizeError; whatever else happens is a fault. Its input is then
kept in tests/data/fuzz, where the suite reads it for good.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError

TESTS = Path(__file__).parent
KEPT = TESTS / "data" / "fuzz"
POCKET = TESTS / "models" / "pocket-gpt2"
SLOWEST = 5.0
"""Seconds of a processor for one input, all of which are smaller than a hundred kilobytes."""
LONGEST = 100_000
TOKENS = (
    b'"\\ud800"', b"NaN", b"1e999", b"-1", b"0", b"18446744073709551616", b"9" * 400, b"null", b"true", b'""', b"[]",
    b"{}", b"[" * 300, b'{"a":' * 300, b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\r", b"\r\n", b"\n---\n", b"../",
    b"/etc/passwd", b"\x1b[2J", b"<script>", b"'''", b'"""', b"]]", b"[[model]]", b"__metadata__", b"&a [*a]", b"0x",
    b"```\n", b"$$", b"](", b"![", b"<!--", b"|", b"#", b"\xe2\x80\xa8", b"\xe2\x80\xae", b"inf", b"nan", b"  ", b"=",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**63,
        2**64,
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        "a/b",
        "../x",
        "\x1b[2J",
        "a\nb",
        "\ud800",
    ),
    *([], [[]], [None], ["a"], {}, {"a": {}}, {"": []}, [0] * 1000, "x" * 10_000),
)


@dataclass(frozen=True)
class Reader:
    """What is read: sound inputs to begin with, and the reading, which takes bytes and a folder to put them into."""

    sound: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]


def fault(reader: Reader, data: bytes, folder: Path) -> str | None:
    """What went wrong while `data` was read, None where it was taken or refused as it should be."""
    began = time.process_time()
    try:
        reader.read(data, folder)
    except QuantizeError as error:
        if not str(error) or any(not line.isprintable() for line in str(error).replace("\xa0", " ").splitlines()):
            return f"a message that is no line of text: {error!r}"
    except Exception:  # noqa: BLE001 - which is what is looked for
        return traceback.format_exc()
    seconds = time.process_time() - began
    return f"{seconds:.1f} s for {len(data)} bytes" if seconds > SLOWEST else None


def damaged(sound: list[bytes], chance: random.Random) -> Iterator[bytes]:
    """Inputs without end, each a sound one with some damage."""
    while True:
        data = chance.choice(sound)
        if chance.random() < 0.5:
            data = _with_other_value(data, chance)
        for _ in range(chance.choice((0, 1, 1, 2, 4, 16))):
            data = _with_other_bytes(data, sound, chance)
        yield data[:LONGEST]


def _with_other_bytes(data: bytes, sound: list[bytes], chance: random.Random) -> bytes:
    begin = chance.randrange(len(data) + 1)
    end = min(len(data), begin + chance.choice((0, 1, 2, 8, 64)))
    other = chance.choice(sound)
    cut = chance.randrange(len(other) + 1)
    new = chance.choice(
        (
            b"",
            chance.randbytes(chance.choice((1, 2, 8))),
            chance.choice(TOKENS),
            data[begin:end] * chance.choice((2, 50)),
            other[cut : cut + 200],
        )
    )
    return data[:begin] if chance.random() < 0.03 else data[:begin] + new + data[end:]


def _with_other_value(data: bytes, chance: random.Random) -> bytes:
    """JSON with another value, or another key, somewhere in it; other data as they are. A length before it is kept."""
    start = 8 if data[8:9] == b"{" else 0
    line_end = data.find(b"\n") + 1 if data.startswith(b"{") and b"\n" in data and start == 0 else 0
    for end in (len(data), line_end):
        try:
            content = json.loads(data[start:end])
        except ValueError:
            continue
        text = json.dumps(_changed(content, chance)).encode()
        return (
            (len(text).to_bytes(8, "little") if start else b"")
            + text
            + (b"\n" if end == line_end else b"")
            + data[end:]
        )
    return data


def _changed(content: Any, chance: random.Random) -> Any:
    if isinstance(content, dict) and content and chance.random() < 0.9:
        key = chance.choice(list(content))
        if chance.random() < 0.1:
            rest = {name: value for name, value in content.items() if name != key}
            return (
                rest if chance.random() < 0.5 else rest | {chance.choice(("", "a", "\ud800", "format")): content[key]}
            )
        return content | {key: _changed(content[key], chance)}
    if isinstance(content, list) and content and chance.random() < 0.8:
        place = chance.randrange(len(content))
        return [*content[:place], _changed(content[place], chance), *content[place + 1 :]]
    return chance.choice(VALUES)


# The readers


def _sound_weights() -> list[bytes]:
    import torch
    from safetensors.torch import save

    values = {
        "a.weight": torch.ones(2, 3),
        "b": torch.ones(4, dtype=torch.float16),
        "c": torch.zeros(0, dtype=torch.int64),
    }
    return [save(values, {"format": "pt"}), save({"x": torch.ones(3, dtype=torch.uint8)})]


def _read_weights(data: bytes, folder: Path) -> None:
    from quantize.formats import safetensors

    path = folder / "model.safetensors"
    path.write_bytes(data)
    for entry in safetensors.entries(path).values():
        safetensors.read(entry, 0, entry.numel, pinned=False)


def _sound_configs() -> list[bytes]:
    config = json.loads((POCKET / "config.json").read_text("utf-8"))
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"metadata": {"total_size": 10}, "weight_map": {"a": shards[0], "b": shards[1]}}
    code = {"AutoModelForCausalLM": "modeling.Own"}
    configs = (
        config,
        config | {"quantization_config": {"quant_method": "fp8"}, "attn_implementation": "sdpa"},
        config | {"model_type": "own", "auto_map": code, "text_config": {"attn_implementation": "eager"}},
    )
    return [json.dumps({"config": one, "index": index}, indent=1).encode() for one in configs]


def _read_configs(data: bytes, folder: Path) -> None:
    from quantize import source
    from quantize.documents import json_object, read_text
    from quantize.errors import CorruptModel
    from quantize.formats.bitsandbytes.config import ExpectedConfig

    path = folder / "config.json"
    path.write_bytes(data)
    both = json_object(read_text(path, path, CorruptModel), path, CorruptModel, finite=False)
    config, index = both.get("config"), both.get("index")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    if isinstance(config, dict):
        path.write_text(json.dumps(config))
        ExpectedConfig.read(folder)
        source.check_config(config, config, "model", False)
    if isinstance(index, dict):
        source.choose_files([*shards, "model.safetensors.index.json", "tokenizer.json"], index, "model", False)


def _sound_catalogues() -> list[bytes]:
    from tests.publishing.workspace import CATALOGUE

    every = (
        b"""[defaults]
recipe = "calibrated"
skip_modules = ["h.0", 'lm_head']
require = "good" # a comment with """
        + b'''"""quotes"""
corpus = """builtin"""
[[model]]
source = "a/b"
repo = "c/d"
private = true
revision = "main"
max_source_gb = 1.5
seed = 0x1f
[[model]]
source = "a/b"
repo = "c/e"
bits = 8
recipe = "rtn"
'''
    )
    return [CATALOGUE.encode(), every, (TESTS.parent / "catalogue.toml").read_bytes()]


def _read_catalogue(data: bytes, folder: Path) -> None:
    from quantize.publishing import catalogue

    path = folder / "catalogue.toml"
    path.write_bytes(data)
    catalogue.read(path)


def _sound_records() -> list[bytes]:
    return [path.read_bytes() for path in sorted((TESTS / "data").glob("*/p*.json"))]


def _read_record(data: bytes, folder: Path) -> None:
    from quantize.evidence import Evidence
    from quantize.records import Provenance
    from quantize.serialization import read_record

    path = folder / "record.json"
    path.write_bytes(data)
    kind: type[Any] = Evidence if b'"checks"' in data else Provenance
    read_record(kind, path)


def _sound_caches() -> list[bytes]:
    from quantize.parity.reference_cache import ReferenceCache

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        ReferenceCache(path, _cache_contents(), lambda: "float32")
        return [path.read_bytes(), path.read_bytes() + bytes(300)]


def _cache_contents() -> Any:
    from quantize.parity.reference_cache import Contents

    return Contents(source="0" * 64, corpus="1" * 64, window=4, seed=0, vocabulary=5)


def _read_cache(data: bytes, folder: Path) -> None:
    import torch

    from quantize.parity.reference_cache import ReferenceCache

    path = folder / "cache"
    path.write_bytes(data)
    cache = ReferenceCache(path, _cache_contents(), lambda: "float32")
    if cache.windows:
        cache.read(0, torch.zeros(1, 4, dtype=torch.long))(slice(0, 3))
        cache.record(1)


def _sound_cards() -> list[bytes]:
    cards = (TESTS / "data" / "source-card.md", POCKET / "README.md")
    return [path.read_bytes() for path in cards]


def _read_card(data: bytes, folder: Path) -> None:
    import model_card
    from quantize import source
    from quantize.records import Checkout

    (folder / "README.md").write_bytes(data)
    text = source.card_text(Checkout(_card_facts()[0], folder))
    facts = _card_facts()[1](text)
    model_card.page(model_card.render(facts), folder)


@functools.cache
def _card_facts() -> tuple[Any, Callable[[str | None], Any]]:
    """The source of a recorded package, and the facts of its card with another card of its source."""
    from quantize.evidence import Evidence
    from quantize.package import card
    from quantize.records import Provenance
    from quantize.serialization import read_record

    recorded = TESTS / "data" / "evidence"
    provenance = read_record(Provenance, recorded / "provenance.json")
    evidence = read_record(Evidence, recorded / "parity.json")
    return provenance.source, lambda text: card.facts(provenance, evidence, text, ())


READERS = {
    "safetensors": Reader(_sound_weights, _read_weights),
    "index-and-config": Reader(_sound_configs, _read_configs),
    "card": Reader(_sound_cards, _read_card),
    "catalogue": Reader(_sound_catalogues, _read_catalogue),
    "records": Reader(_sound_records, _read_record),
    "cache": Reader(_sound_caches, _read_cache),
}


# For as long as one likes


def main() -> int:
    """Fuzz the readers in turn for some minutes; 1 where a fault was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all of them by default")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="another one each time by default")
    asked = parser.parse_args()
    if unknown := set(asked.readers) - set(READERS):
        parser.error(f"no reader is called {', '.join(sorted(unknown))}: there are {', '.join(READERS)}")
    seed = random.randrange(2**32) if asked.seed is None else asked.seed
    names = asked.readers or list(READERS)
    faults = 0
    for name in names:
        tried, faulty = _fuzz(name, random.Random(f"{seed} {name}"), 60 * asked.minutes / len(names))
        print(f"{name}: {tried:,} inputs, {faulty} faults (seed {seed})")
        faults += faulty
    return 1 if faults else 0


def _fuzz(name: str, chance: random.Random, seconds: float) -> tuple[int, int]:
    """How many inputs a reader got, and how many were faults; those are kept."""
    reader, tried, places = READERS[name], 0, set[str]()
    sound = reader.sound()
    inputs, end = damaged(sound, chance), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="quantize-fuzz-") as folder:
        fault(reader, sound[0], Path(folder))  # libraries are imported with it, which takes seconds
        while time.monotonic() < end:
            data = next(inputs)
            tried += 1
            said = fault(reader, data, Path(folder))
            place = "\n".join(said.splitlines()[-4:-1]) if said else ""
            if said and place not in places:  # one input for each place that fails
                places.add(place)
                kept = KEPT / name / hashlib.sha256(data).hexdigest()[:16]
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)
                print(f"{name}: {kept}\n{said}", file=sys.stderr)
    return tried, len(places)


if __name__ == "__main__":
    sys.exit(main())
