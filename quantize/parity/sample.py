"""The loss of one model on a few texts, which shows that a downloaded checkpoint computes what its package does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.errors import memory_errors
from quantize.formats.model_class import auto_class


def sample_loss(folder: Path, texts: Sequence[str], device: str, trust_remote_code: bool) -> tuple[int, float]:
    """Tokens predicted in `texts`, and their mean loss in nats, under the model that stock transformers loads."""
    import torch
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    tokens, total = 0, 0.0
    with memory_errors(f"reading a sample with {folder.name}", "end other programs"), torch.inference_mode():
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = auto_class(folder).from_pretrained(folder, device_map={"": device}, use_safetensors=True, **options)
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids.to(device)
            if ids.shape[1] < 2:
                continue
            logits = model.eval()(ids).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
    return tokens, total / max(tokens, 1)
