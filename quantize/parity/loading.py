"""Reference and candidate, loaded from their folders by stock transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize import devices
from quantize.errors import DeviceError
from quantize.records import Checkout

FLOAT32_SHARE = 0.6
"""Of the free memory: above it the reference is loaded in half precision, and the evidence says so."""


@dataclass(frozen=True)
class Pair:
    """Two models of the same shape on one device, and the source's tokenizer."""

    reference: Any
    candidate: Any
    tokenizer: Any
    reference_dtype: str
    device: str

    @property
    def context(self) -> int:
        """The longest window that the model reads, in tokens."""
        config = self.reference.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1024)


def load_reference(checkout: Checkout, device: str) -> tuple[Any, str]:
    """The source in float32, or in its own half precision where float32 does not fit; and which it was."""
    import torch

    roomy = checkout.source.parameters * 4 <= devices.free_memory(device) * FLOAT32_SHARE
    half = torch.bfloat16 if checkout.source.dtype == "BF16" else torch.float16
    dtype = torch.float32 if roomy else half
    model = _load(checkout.folder, device, checkout.source.remote_code, dtype=dtype)
    return model, str(dtype).removeprefix("torch.")


def load_candidate(folder: Path, device: str, trust_remote_code: bool, dtype: str | None = None) -> Any:
    """The package as its users load it: where `dtype` is not given, types come from its config."""
    options = {} if dtype is None else {"dtype": dtype}
    return _load(folder, device, trust_remote_code, **options)


def widen(model: Any) -> None:
    """Let a quantized model compute in float32, over exactly the weights that it stores.

    CPUs without half-precision units compute several times slower in it. Dequantized weights, embeddings, norms
    and biases keep their stored values; only products and sums are done in more digits.
    """
    import torch

    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if getattr(module, "compute_dtype", None) is not None:
            module.compute_dtype = torch.float32


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _load(folder: Path, device: str, trust_remote_code: bool, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{folder.name} does not fit on {device} beside the other model: try --device cpu") from error
    model.generation_config = GenerationConfig()  # its own may ask for sampling or penalties where none are wanted
    return model.eval()
