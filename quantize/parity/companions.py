"""Is what lies beside the weights the source's? Tokenizer, chat template, generation settings, processor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel, first_line
from quantize.evidence import Check
from quantize.files import PROCESSOR_FILES
from quantize.formats import remote_code
from quantize.parity import generation_settings
from quantize.parity.generation_settings import ends_in
from quantize.parity.models import load_tokenizer

TOKENIZER_SAMPLE = (
    "Plain words, numbers 3.14159 and 1,000,000; CamelCase, snake_case.\n\tdef f(x): return x**2  # code\n"
    "Ünïcödé, 中文字, 日本語, العربية, emoji 🙂👩‍👩‍👧, a  b   c, <|endoftext|> <s> </s>"
)
PROCESSOR_KINDS = ("image_processor", "video_processor", "feature_extractor", "audio_processor")
ABSENT = "absent"
LONGEST_SHOWN = 60


def checks(source: Path, tokenizer: Any, folder: Path, trust_remote_code: bool) -> list[Check]:
    """Compare what `folder` has beside its weights with the `source`'s, whose tokenizer is given."""
    try:
        own = load_tokenizer(folder, trust_remote_code)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare ones
        return [Check("tokenizer", False, f"does not load: {first_line(error)}")]
    try:
        settings = [generation_settings.read(place, trust_remote_code) for place in (source, folder)]
        processor, own_processor = (_processor(place) for place in (source, folder))
    except CorruptModel as error:
        return [Check("generation settings", False, str(error))]
    return [
        _tokenizer_check(tokenizer, own),
        _equality("special tokens", dict(tokenizer.special_tokens_map), dict(own.special_tokens_map)),
        _equality("added tokens", _added_tokens(tokenizer), _added_tokens(own)),
        _equality("chat template", _templates(tokenizer), _templates(own)),
        _equality("eos tokens", _ends(tokenizer, settings[0]), _ends(own, settings[1])),
        _equality("generation settings", *settings),
        _equality("processor files", processor, {name: own_processor.get(name) for name in processor}),
    ]


def _tokenizer_check(source: Any, own: Any) -> Check:
    if own.get_vocab() != source.get_vocab():
        return Check("tokenizer", False, "another vocabulary than the source's")
    ids = source(TOKENIZER_SAMPLE).input_ids
    if own(TOKENIZER_SAMPLE).input_ids != ids:
        return Check("tokenizer", False, "other ids than the source's")
    if own.decode(ids) != source.decode(ids):
        return Check("tokenizer", False, "other text for the same ids than the source's")
    return Check("tokenizer", True, "same vocabulary, same ids for a mixed sample and back")


def _equality(name: str, source: Mapping[str, Any], own: Mapping[str, Any]) -> Check:
    """Whether two sets of named values are the same; the detail shows the first that differs."""
    different = sorted(key for key in source.keys() | own.keys() if source.get(key) != own.get(key))
    if not different:
        return Check(name, True, "the source's" if source else "none, as in the source")
    first = different[0]
    more = f" ({len(different)} differ)" if len(different) > 1 else ""
    detail = f"{first} is {_shown(source.get(first))} in the source and {_shown(own.get(first))} here{more}"
    return Check(name, False, detail)


def _shown(value: Any) -> str:
    text = ABSENT if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def _added_tokens(tokenizer: Any) -> dict[str, Any]:
    """By its text each token that stands for itself, with its id and how it is cut out of a text."""
    return {
        token.content: [index, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized]
        for index, token in tokenizer.added_tokens_decoder.items()
    }


def _templates(tokenizer: Any) -> dict[str, str]:
    template = tokenizer.chat_template or {}
    return dict(template) if isinstance(template, dict) else {"the template": template}


def _ends(tokenizer: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return {"eos_token of the tokenizer": tokenizer.eos_token_id, "eos_token_id of generate": list(ends_in(settings))}


def _processor(folder: Path) -> dict[str, Any]:
    """The settings in a model's processor files, whichever of them holds which; raises CorruptModel."""
    found: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            found.update(_leaves(read_json(folder / name, name, CorruptModel)))
    return found


def _leaves(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Saving anew moves each processor's settings below its kind in one file."""
    for name, value in settings.items():
        if name in PROCESSOR_KINDS and isinstance(value, dict):
            yield from _leaves(value)
        elif name not in ("transformers_version", *remote_code.KEYS):
            yield name, value
