"""The pocket model's first block alone: weights of real training still, at a quarter of the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

POCKET = Path(__file__).parent / "pocket-gpt2"
FIRST = "transformer.h.0."


def save(folder: Path) -> Path:
    """Write it into the new folder `folder`, with the pocket model's tokenizer and card."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 1}, indent=2) + "\n")
    tensors = load_file(POCKET / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if name.startswith(FIRST) or ".h." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder
