"""Reference and candidate, loaded from their folders by stock transformers, where their memory allows."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantize import devices
from quantize.errors import DeviceError, memory_errors
from quantize.formats import experts, source_model
from quantize.formats.bitsandbytes import loading
from quantize.formats.safetensors import weight_bytes
from quantize.parity import framing, generation_settings
from quantize.records import Checkout

CHECKPOINT = "the checkpoint"
"""What errors call a candidate: its folder's name says nothing during a run."""
HALF = {"BF16": "bfloat16"}
"""The half precision of a source by the type it is stored in; float16 for all others."""

ADVICE = "end other programs, try another --device, or --reference-cache FILE, which loads one model at a time"
"""Where memory does not suffice."""


@dataclass(frozen=True)
class Placed:
    """A model in memory: the type of its arithmetic, and the devices that hold its weights, the main one first."""

    model: Any
    dtype: str
    places: tuple[str, ...]


class Pair:
    """The two models of a comparison on one device, and the source's tokenizer.

    Side by side both stay in memory. One at a time, asking for one drops the other, so whoever uses a pair does
    all that it can with one model before it turns to the other.
    """

    def __init__(
        self, checkout: Checkout, candidate: Path, device: str, trust: bool, tokenizer: Any, alone: bool
    ) -> None:
        self.checkout, self.folder, self.device, self.trust = checkout, candidate, device, trust
        self.tokenizer, self.alone = tokenizer, alone
        self.reference_dtype, self.candidate_dtype = "none", "none"
        self.reference_devices: tuple[str, ...] = ()
        self._upcast = False
        self._loaded: dict[str, Placed] = {}
        self._offload = TemporaryDirectory(prefix="quantize-offload-")

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded.clear()
        self._offload.cleanup()

    @property
    def reference(self) -> Any:
        return self.placed_reference.model

    @property
    def placed_reference(self) -> Placed:
        beside = 0 if self.alone or "candidate" in self._loaded else weight_bytes(self.folder)
        return self._load_once("reference", lambda: self._load_reference(beside))

    @property
    def candidate(self) -> Any:
        return self._load_once("candidate", self._load_candidate).model

    @functools.cached_property
    def _config(self) -> Any:
        return text_config(self.checkout)

    @property
    def context(self) -> int:
        """The longest window that the model reads, in tokens."""
        return source_model.context(self._config)

    @property
    def vocabulary(self) -> int:
        """Logits that the reference gives for each position."""
        return int(self._config.vocab_size)

    @functools.cached_property
    def chat(self) -> bool:
        """Whether prompts go through the source's chat template."""
        return framing.has_template(self.tokenizer)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text, as the source's generation settings list them, its config or its tokenizer."""
        settings = generation_settings.read(self.checkout.folder, self.checkout.source.remote_code)
        ends = generation_settings.ends_in(settings) or generation_settings.ends_in(self._config.to_dict())
        own = self.tokenizer.eos_token_id
        return tuple(token for token in ends or ([] if own is None else [own]) if token < self.vocabulary)

    @contextmanager
    def weights_beside_candidate(self) -> Iterator[tuple[Any, Any]]:
        """Reference and candidate together, for their weights; one at a time the reference gets what memory is left."""
        candidate = self.candidate
        if self.alone:
            yield self._load_reference(0).model, candidate
        else:
            yield self.reference, candidate

    def another(self, folder: Path, dtype: str | None) -> Any:
        """Another version of the source, which one at a time takes the place of both."""
        if self.alone:
            self._clear()
        trust = self.checkout.source.remote_code or experts.names_only_own_code(folder)
        placed = load_candidate(folder, self.device, trust, dtype)
        if self._upcast and dtype is None:
            loading.upcast(placed.model)
        return placed.model

    def upcast(self) -> None:
        """Load the candidate again to compute in float32 from now on, and others in its place as well."""
        self._upcast = True
        self._loaded.pop("candidate", None)

    def _load_once(self, name: str, load: Callable[[], Placed]) -> Placed:
        if name not in self._loaded:
            if self.alone:
                self._clear()
            self._loaded[name] = load()
        return self._loaded[name]

    def _clear(self) -> None:
        import torch

        self._loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load_reference(self, beside: int) -> Placed:
        placed = load_reference(self.checkout, self.device, beside, Path(self._offload.name))
        self.reference_dtype, self.reference_devices = placed.dtype, placed.places
        return placed

    def _load_candidate(self) -> Placed:
        placed = load_candidate(self.folder, self.device, self.trust)
        self.candidate_dtype = placed.dtype
        if self._upcast:
            loading.upcast(placed.model)
            self.candidate_dtype = "float32"
        return placed


def text_config(checkout: Checkout) -> Any:
    """What the source's config says of the part that reads and writes text."""
    from transformers import AutoConfig

    trust = checkout.source.remote_code
    config = AutoConfig.from_pretrained(checkout.folder, local_files_only=True, trust_remote_code=trust)
    return config.get_text_config()


def load_reference(checkout: Checkout, device: str, beside: int, offload: Path) -> Placed:
    """The source in float32, in half precision where that does not fit, or spread where neither does.

    `beside` bytes are left free on `device` for another model. Spread means accelerate's device map: further
    accelerators, the CPU's memory, and at last the folder `offload` on disk.
    """
    source, free = checkout.source, devices.usable_memory(device) - beside
    half = HALF.get(source.dtype, "float16")
    for dtype, width in (("float32", 4), (half, 2)):
        if source.parameters * width <= free:
            return _load(checkout.folder, source.name, source.remote_code, {"": device}, dtype=dtype)
    memory = {**devices.accelerators(device), "cpu": devices.usable_memory("cpu")}
    first = next(iter(memory))
    memory[first] = max(0, memory[first] - beside)
    spread = {"max_memory": memory, "offload_folder": offload / source.name}
    return _load(checkout.folder, source.name, source.remote_code, "auto", dtype=half, **spread)


def load_candidate(folder: Path, device: str, trust_remote_code: bool, dtype: str | None = None) -> Placed:
    """The package as its users load it: where `dtype` is not given, types come from its config.

    One that is too large for `device` is spread over all accelerators; raises DeviceError where that is too little.
    """
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    needed = weight_bytes(folder)
    if needed <= devices.usable_memory(device):
        return _load(folder, CHECKPOINT, trust_remote_code, {"": device}, **options)
    memory = devices.accelerators(device)
    if needed > sum(memory.values()):
        raise DeviceError(
            f"{folder.name} needs {needed / 1e9:.2f} GB on {device}, where "
            f"{devices.usable_memory(device) / 1e9:.2f} GB can be used: try --reference-cache FILE, which "
            f"loads one model at a time, or another --device"
        )
    return _load(folder, CHECKPOINT, trust_remote_code, "auto", max_memory=memory, **options)


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _load(folder: Path, name: str, trust_remote_code: bool, device_map: Any, **options: Any) -> Placed:
    from transformers import GenerationConfig

    with memory_errors(f"loading {name}", ADVICE):
        model = source_model.load(folder, name, device_map=device_map, trust_remote_code=trust_remote_code, **options)
    model.generation_config = GenerationConfig()  # its own may ask for sampling or penalties where none are wanted
    device_of = device_map if isinstance(device_map, dict) else model.hf_device_map
    used = tuple(dict.fromkeys(devices.name(device) for device in device_of.values()))
    return Placed(model.eval(), str(model.dtype).removeprefix("torch."), used)
