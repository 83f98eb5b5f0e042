"""Loads packages with old and current libraries, compares what they compute, and writes docs/consumers.md.

scripts/consumers FOLDER     makes environments, models and packages in FOLDER, and needs the package index
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests import mixtures, vision

ROOT = Path(__file__).parents[1]
POCKET, TEXT = ROOT / "tests/models/pocket-gpt2", ROOT / "tests/data/wikitext-like.txt"
PAGE = ROOT / "docs/consumers.md"
OLDEST, CURRENT = "oldest", "current"
OLDEST_PINS = ("transformers==4.57.*", "accelerate==1.10.*", "bitsandbytes==0.48.*")
LIBRARIES = ("torch", "transformers", "accelerate", "bitsandbytes")
ROPE_THETA = 100000.0
TOLERANCE = 0.005
"""Relative difference of perplexities that kernels may make; another base of the rotary embedding makes more."""
SHAPE: dict[str, Any] = {
    **{"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False},
}
OLD_DIALECT = {"rope_theta": ROPE_THETA, "torch_dtype": "float16", "transformers_version": "4.42.3"}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ENDS = [0, 7]
EXPERTS = "mixture of experts (Qwen3, `trust_remote_code=True`)"
REWRITTEN = "the Llama, with a config.json that transformers 5 wrote"
ONLY_CURRENT = {EXPERTS, REWRITTEN}
"""What the oldest libraries cannot load, or compute otherwise."""
RUN = ("--recipe", "rtn", "--device", "cpu", "--max-windows", "16", "--new-tokens", "4", "--unverified")


@dataclass(frozen=True)
class Reading:
    """What one environment computes with one package."""

    versions: dict[str, str]
    perplexity: float
    prompt: list[int]
    ends: int | list[int]
    generated: list[int]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {OLDEST: environment(folder / OLDEST, OLDEST_PINS), CURRENT: environment(folder / CURRENT, pins())}
    packages = {
        "pocket model (GPT-2)": package(pocket(folder / "pocket-gpt2"), folder),
        f"Llama with `rope_theta` {ROPE_THETA:.0f}": package(llama(folder / "llama"), folder),
        "chat model (Llama, template, two end tokens)": package(chat_model(folder / "chat"), folder),
        EXPERTS: package(experts(folder / "experts"), folder),
        "model of pictures and text (LLaVA), asked about a picture": package(seer(folder / "seer"), folder),
    }
    packages[REWRITTEN] = rewritten(folder / "llama-bnb-4bit")
    readings = {
        name: {place: read(python, made) for place, python in pythons.items()} for name, made in packages.items()
    }
    PAGE.write_text(page(readings), "utf-8")
    print(PAGE.read_text("utf-8"))
    sys.exit({name for name, both in readings.items() if not agree(*both.values())} != ONLY_CURRENT)


def environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """The Python of an environment that has these and torch as it is pinned here."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, pinned("torch")], check=True)
        subprocess.run([*install, pinned("pillow"), *requirements], check=True)
        (folder / "installed").touch()
    return python


def pins() -> tuple[str, ...]:
    return tuple(pinned(name) for name in LIBRARIES)


def pinned(name: str) -> str:
    """The line of a library in the constraints."""
    lines = (ROOT / "scripts/constraints.txt").read_text("utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def pocket(folder: Path) -> Path:
    """The pocket model with a tokenizer that both know."""
    shutil.copytree(POCKET, folder, dirs_exist_ok=True)
    tokenizer(folder)
    return folder


def tokenizer(folder: Path) -> None:
    """The pocket model's, under the name of its class that transformers 4 knows as well."""
    shutil.copy(POCKET / "tokenizer.json", folder)
    settings = json.loads((POCKET / "tokenizer_config.json").read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def llama(folder: Path, seed: int = 0) -> Path:
    """A Llama with random weights, whose config.json is as most repos have it, without `rope_parameters`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=parameters))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.half().save_pretrained(folder)
    old_dialect(folder)
    tokenizer(folder)
    return folder


def old_dialect(folder: Path, former: Mapping[str, str] = MappingProxyType({})) -> None:
    """Let a config.json say what transformers 4 said in its place, fields by their `former` names."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {former.get(name, name): value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    (folder / "config.json").write_text(json.dumps({**kept, **OLD_DIALECT}, indent=2), "utf-8")


def chat_model(folder: Path) -> Path:
    """Another such Llama with a chat template and a list of tokens that end an answer."""
    llama(folder, seed=1)
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    settings = {"bos_token_id": 0, "eos_token_id": ENDS, "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def experts(folder: Path) -> Path:
    """A mixture of experts with random weights, one expert beside the other in the file, as those on the Hub."""
    parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    mixtures.mixture("qwen3_moe", rope_parameters=parameters).half().save_pretrained(folder)
    old_dialect(folder, {"num_local_experts": "num_experts"})
    tokenizer(folder)
    return folder


def seer(folder: Path) -> Path:
    """A model that reads pictures, with random weights, in files as transformers 4 has them.

    Those that transformers 5.23 writes have no `vision_model` in its tower's names: 4.57 makes it of random weights.
    """
    from safetensors.torch import load_file, save_file

    vision.save(folder)
    weights = folder / "model.safetensors"
    renamed = {
        re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name): value
        for name, value in load_file(weights).items()
    }
    save_file(renamed, weights, {"format": "pt"})
    ids = (folder / "tokenizer.json").read_bytes()
    tokenizer(folder)
    (folder / "tokenizer.json").write_bytes(ids)
    images = vision.PROCESSOR["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images), "utf-8")
    return folder


def package(source: Path, folder: Path) -> Path:
    """The package of a model, made with the current libraries."""
    output = folder / f"{source.name}-bnb-4bit"
    command = [sys.executable, "-m", "quantize", "run", str(source), "--output", str(output), "--force", *RUN]
    subprocess.run(command, check=True, cwd=ROOT)
    return output


def rewritten(made: Path) -> Path:
    """A copy of a package whose config.json transformers has read and written."""
    from transformers import AutoConfig

    copy = made.with_name(f"{made.name}-rewritten")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(made, copy)
    AutoConfig.from_pretrained(copy).save_pretrained(copy)
    return copy


def read(python: Path, made: Path) -> Reading | None:
    """What the environment of a Python computes with a package; None where it cannot load it, and says why."""
    command = [python, ROOT / "scripts/consumer.py", made, TEXT]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        print(f"{python} cannot read {made}:\n{ended.stderr[-3000:]}", file=sys.stderr)
        return None
    return Reading(**json.loads(ended.stdout.splitlines()[-1]))


def agree(old: Reading | None, new: Reading | None) -> bool:
    """Whether both compute the same, are asked the same, and end where the other does."""
    if old is None or new is None:
        return False
    close = abs(old.perplexity / new.perplexity - 1) <= TOLERANCE
    return close and (old.prompt, old.ends) == (new.prompt, new.ends)


def page(readings: dict[str, dict[str, Reading | None]]) -> str:
    rows = "\n".join(row(name, both[OLDEST], both[CURRENT]) for name, both in readings.items())
    first = next(iter(readings.values()))
    versions = "\n".join(
        f"| {place} | " + " | ".join(reading.versions[name] for name in LIBRARIES) + " |"
        for place, reading in first.items()
        if reading is not None
    )
    return f"""# What reads a package

`scripts/consumers FOLDER` installs the oldest libraries that packages are tried with, and the current ones, in
environments of their own, and loads packages in each as their users do. It wrote this page.

| | {" | ".join(LIBRARIES)} |
|---|{"---|" * len(LIBRARIES)}
{versions}

| package | perplexity, oldest | perplexity, current | greedy tokens that agree | same prompt and end tokens | |
|---|---:|---:|---:|---|---|
{rows}

Perplexities are those of eight windows of 128 tokens, each after a picture where the model reads pictures; models with
random weights have large ones. Up to {TOLERANCE:.1%} of difference is the kernels' own, which round differently from
one version of bitsandbytes to the next.

**Why it works.** The package's config.json is the original's own, in which only `quantization_config`, the type of the
weights and, where it differs, the class are set. The last row shows what happens otherwise: transformers 5 keeps the
base of the rotary embedding in `rope_parameters`, where transformers 4.57 does not look. It takes its default of 10000,
without a word, and computes something else.

**Pictures.** The package has the original's names of tensors. An original in the files that transformers 5.23 itself
writes leaves `vision_model` out of the names of its CLIP tower. transformers 4.57 does not find these, says so in a
warning, and goes on with a tower of random weights, as it does with such an original. The card of such a package names
the transformers that wrote the original as the least.

**Experts.** transformers 4.57 puts a 4-bit matrix in the place of the router, which is no linear module in transformers
5 and lies in the file in half precision, so that loading ends in an error. Cards of such packages name the transformers
that made them as the least.

**What the card says.** Each card names the least versions: those above, a later transformers where the original's
config.json was written by a later one or the package holds code for experts, and for packages with blocks of 32 weights
the bitsandbytes that made them.
"""


def row(name: str, old: Reading | None, new: Reading | None) -> str:
    if old is None or new is None:
        cells = (f"{reading.perplexity:.3f}" if reading else "cannot load" for reading in (old, new))
        return f"| {name} | {' | '.join(cells)} | | | **differs** |"
    pairs = zip(old.generated, new.generated, strict=False)
    agreeing = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    alike = "yes" if (old.prompt, old.ends) == (new.prompt, new.ends) else "no"
    verdict = "the same" if agree(old, new) else "**differs**"
    figures = f"{old.perplexity:.3f} | {new.perplexity:.3f} | {agreeing} of {len(new.generated)}"
    return f"| {name} | {figures} | {alike} | {verdict} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
