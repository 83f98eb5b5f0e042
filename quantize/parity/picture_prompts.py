"""How a picture and a question are put to a model: through the original's own processor and its chat template."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantize.documents import read_json
from quantize.errors import CorruptModel, first_line
from quantize.files import CONFIG, PROCESSOR_FILES
from quantize.formats.model_class import reads_pictures
from quantize.parity.pictures import Picture
from quantize.records import Checkout

LIBRARIES = {"torchvision": "torchvision", "PIL": "pillow"}
"""Which processors need, by the name they are imported by, and the package that has each."""

COUNTS = re.compile(r"height|width|edge|seq_len|num_|tiles|crops|min_pixels")
"""In the names of settings by which a processor makes a picture, or what stands for it in a prompt, larger."""
MOST_TOKENS, MOST_NUMBERS = 1 << 15, 1 << 27
"""That a processor may make of one picture and its question, whatever its settings are called; the drawn pictures are
small, and no known processor comes near."""
MOST, LARGEST_AREA = 4096, 1 << 22
"""Of such a setting; some processors state what a picture has at least in pixels altogether."""
AREAS = {"merge_size", "min_pixels", "max_pixels"}
"""Settings by which those are known."""


class NoPictures(Exception):
    """Pictures cannot be put to the original here; the message says why."""


@dataclass(frozen=True)
class Prompter:
    """A processor that takes pictures, and whether it has a chat template."""

    processor: Any
    chat: bool

    @classmethod
    def of(cls, checkout: Checkout) -> Prompter:
        """The source's own; raises NoPictures where there is none, or it cannot be loaded."""
        from transformers import AutoProcessor

        if not any((checkout.folder / name).is_file() for name in PROCESSOR_FILES):
            raise NoPictures("the original has no processor")
        _require_bounded(checkout)
        try:
            processor = AutoProcessor.from_pretrained(
                checkout.folder, local_files_only=True, trust_remote_code=checkout.source.remote_code
            )
        except Exception as error:
            reason = _reason(error).replace(str(checkout.folder), checkout.source.name)
            raise NoPictures(f"the original's processor cannot be loaded: {reason}") from error
        if getattr(processor, "image_processor", None) is None:
            raise NoPictures("the original's processor files make no processor that takes pictures")
        return cls(processor, bool(getattr(processor, "chat_template", None)))

    def inputs(self, picture: Picture) -> Any:
        """All that the model is given, a batch of one on the CPU, up to where its answer begins; raises NoPictures."""
        from PIL import Image

        image = Image.fromarray(picture.pixels)
        try:
            given = self._in_template(image, picture.question) if self.chat else self._plain(image, picture.question)
        except Exception as error:
            raise NoPictures(f"the original's processor takes no picture: {_reason(error)}") from error
        _require_moderate(given)
        return given

    def _in_template(self, image: Any, question: str) -> Any:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def _plain(self, image: Any, question: str) -> Any:
        return self.processor(text=f"{self.processor.image_token}{question}", images=image, return_tensors="pt")


def sees(checkout: Checkout) -> bool:
    """Whether a source is a model that reads pictures."""
    return reads_pictures(read_json(checkout.folder / CONFIG, CONFIG, CorruptModel, finite=False))


def problem(checkout: Checkout) -> str:
    """Why pictures cannot be put to a source that reads them; nothing where they can, or where it reads none."""
    if not sees(checkout):
        return ""
    try:
        Prompter.of(checkout)
    except NoPictures as reason:
        return str(reason)
    return ""


def _require_bounded(checkout: Checkout) -> None:
    """Raise NoPictures where a processor would make of any picture one that no memory holds."""
    for file in PROCESSOR_FILES:
        if not (checkout.folder / file).is_file():
            continue
        settings = list(_settings(read_json(checkout.folder / file, file, CorruptModel)))
        most = LARGEST_AREA if AREAS & {name for name, _ in settings} else MOST
        for name, value in settings:
            limit = most if name in ("shortest_edge", "min_pixels") else MOST
            is_upper_limit = name == "longest_edge" and most == LARGEST_AREA
            if COUNTS.search(name) and value > limit and not is_upper_limit:
                raise NoPictures(f"{name} = {value:g} in the original's {file} asks for more than can be")


def _require_moderate(given: Any) -> None:
    """Raise NoPictures where a processor has made more of a picture than a model can be given."""
    tokens = given["input_ids"].numel()
    numbers = sum(value.numel() for value in given.values() if hasattr(value, "numel"))
    if tokens > MOST_TOKENS or numbers > MOST_NUMBERS:
        raise NoPictures(f"the original's processor makes {tokens:,} tokens and {numbers:,} numbers of one picture")


def _settings(content: Any) -> Iterator[tuple[str, float]]:
    """All numbers in a processor's file, with their names."""
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(value, int | float):
                yield name, value
            else:
                yield from _settings(value)
    elif isinstance(content, list):
        for item in content:
            yield from _settings(item)


def _reason(error: Exception) -> str:
    """What is not installed, or the first sentence of the message."""
    absent = [name for name in LIBRARIES if importlib.util.find_spec(name) is None and name in str(error).lower()]
    if absent:
        return f"it needs {absent[0]}, which is not installed (pip install {LIBRARIES[absent[0]]})"
    return first_line(error).split(". ")[0]
